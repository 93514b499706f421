"""The fine-tuning methods: one a file, one signature. `METHODS` is the only list of them."""

from farss.methods.base import Method
from farss.methods.farss import FARSS
from farss.methods.farss_all_high import FARSS_ALL_HIGH
from farss.methods.farss_fixed import FARSS_FIXED
from farss.methods.farss_init import FARSS_INIT
from farss.methods.full import FULL
from farss.methods.lora import LORA
from farss.methods.milora import MILORA
from farss.methods.pissa import PISSA

METHODS: dict[str, Method] = {method.name: method for method in (FARSS, LORA, PISSA, MILORA, FARSS_INIT, FARSS_ALL_HIGH, FARSS_FIXED, FULL)}

__all__ = ["METHODS", "Method"]
