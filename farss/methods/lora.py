"""LoRA: one rank everywhere, random A, zero B (Hu et al., ICLR 2022); PEFT's own initialisation."""

from __future__ import annotations

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods.base import Context, Method, uniform_plan


def plan(config: PlanConfig, context: Context) -> Plan:
    """Rank `plan.rank`, or the one that `plan.match_params` gives, in every target layer."""
    return uniform_plan(config, context, None)


LORA = Method(
    name="lora",
    title="LoRA (Hu et al., ICLR 2022)",
    changes="one rank in every layer, starting from zero",
    plan=plan,
)
