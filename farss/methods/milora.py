"""MiLoRA: start from the smallest singular directions of every weight (Wang et al., NAACL 2025)."""

from __future__ import annotations

from functools import partial

from farss.methods.base import Method
from farss.methods.singular import SINGULAR
from farss.methods.uniform import uniform_plan

MILORA = Method(
    name="milora",
    title="MiLoRA (Wang et al., NAACL 2025)",
    needs=SINGULAR,
    changes="one rank in every layer, starting from the smallest singular directions",
    plan=partial(uniform_plan, side="least"),
)
