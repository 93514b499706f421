"""FARSS's start without its ranks and depths: the least important directions everywhere (FARSS, Table 4 and Figure 3)."""

from __future__ import annotations

from functools import partial

from farss.methods.base import SURVEY, Method
from farss.methods.farss import everywhere

FARSS_INIT = Method(
    name="farss-init",
    title="FARSS-init (FARSS, Table 4)",
    needs=SURVEY,
    changes="one rank in every layer, starting from the least important directions",
    plan=partial(everywhere, side="least"),
)
