"""PiSSA: start from the largest singular directions of every weight (Meng et al., NeurIPS 2024).

It is FARSS without data: with A = G = I a direction's score is its squared singular value."""

from __future__ import annotations

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods.base import Context, Method, uniform_plan
from farss.methods.singular import SINGULAR


def plan(config: PlanConfig, context: Context) -> Plan:
    """The directions with the largest singular values."""
    return uniform_plan(config, context, "most")


PISSA = Method(
    name="pissa",
    title="PiSSA (Meng et al., NeurIPS 2024)",
    needs=SINGULAR,
    changes="one rank in every layer, starting from the largest singular directions",
    plan=plan,
)
