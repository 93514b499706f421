"""FARSS's start without its ranks and depths: the most important directions everywhere (FARSS, Table 6)."""

from __future__ import annotations

from functools import partial

from farss.methods.base import SURVEY, Method
from farss.methods.farss import everywhere

FARSS_ALL_HIGH = Method(
    name="farss-all-high",
    title="FARSS, All-high (FARSS, Table 6)",
    needs=SURVEY,
    changes="one rank in every layer, starting from the most important directions",
    plan=partial(everywhere, side="most"),
)
