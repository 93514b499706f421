"""PiSSA: start from the largest singular directions of every weight (Meng et al., NeurIPS 2024).

It is FARSS without data: with A = G = I a direction's score is its squared singular value."""

from __future__ import annotations

from functools import partial

from farss.methods.base import Method
from farss.methods.singular import SINGULAR
from farss.methods.uniform import uniform_plan

PISSA = Method(
    name="pissa",
    title="PiSSA (Meng et al., NeurIPS 2024)",
    needs=SINGULAR,
    changes="one rank in every layer, starting from the largest singular directions",
    plan=partial(uniform_plan, side="most"),
)
