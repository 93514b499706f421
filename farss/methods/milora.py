"""MiLoRA: start from the smallest singular directions of every weight (Wang et al., NAACL 2025)."""

from __future__ import annotations

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods.base import Context, Method, uniform_plan
from farss.methods.singular import SINGULAR


def plan(config: PlanConfig, context: Context) -> Plan:
    """The directions with the smallest singular values."""
    return uniform_plan(config, context, "least")


MILORA = Method(
    name="milora",
    title="MiLoRA (Wang et al., NAACL 2025)",
    needs=SINGULAR,
    changes="one rank in every layer, starting from the smallest singular directions",
    plan=plan,
)
