"""The fine-tuning methods: one a file, one signature. `METHODS` is the only list of them."""

from farss.methods.adalora import ADALORA
from farss.methods.base import SURVEY, Method, Reading, Regime, check_elsewhere
from farss.methods.corda import CORDA_IPM, CORDA_KPM
from farss.methods.dora import DORA
from farss.methods.eva import EVA
from farss.methods.farss import FARSS
from farss.methods.farss_all_high import FARSS_ALL_HIGH
from farss.methods.farss_fixed import FARSS_FIXED
from farss.methods.farss_init import FARSS_INIT
from farss.methods.farss_plus import FARSS_PLUS
from farss.methods.fora import FORA
from farss.methods.full import FULL
from farss.methods.kasa import KASA
from farss.methods.lora import LORA
from farss.methods.lora_null import LORA_NULL, LORA_NULL_V2
from farss.methods.milora import MILORA
from farss.methods.olora import OLORA
from farss.methods.pissa import PISSA

_ALL = (
    *(FARSS, FARSS_PLUS, LORA, DORA, ADALORA, PISSA, OLORA, MILORA, CORDA_IPM, CORDA_KPM, LORA_NULL, LORA_NULL_V2),
    *(KASA, EVA, FORA, FARSS_INIT, FARSS_ALL_HIGH, FARSS_FIXED, FULL),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}

__all__ = ["METHODS", "SURVEY", "Method", "Reading", "Regime", "check_elsewhere"]
