"""The fine-tuning methods: one a file, one signature. `METHODS` is the only list of them."""

from farss.methods.base import Method
from farss.methods.farss import FARSS
from farss.methods.full import FULL
from farss.methods.lora import LORA

METHODS: dict[str, Method] = {method.name: method for method in (FARSS, LORA, FULL)}

__all__ = ["METHODS", "Method"]
