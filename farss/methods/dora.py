"""DoRA: a LoRA for the direction of every row of the weight, and its length trained apart (Liu et al., ICML 2024); PEFT's own."""

from __future__ import annotations

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods.base import Context, Method, uniform_plan


def plan(config: PlanConfig, context: Context) -> Plan:
    """One rank everywhere, and a length for each row."""
    return uniform_plan(config, context, None, beside=lambda rank, rows: rows)


DORA = Method(
    name="dora",
    title="DoRA (Liu et al., ICML 2024)",
    changes="one rank in every layer, starting from zero, and the lengths of the weights' rows",
    plan=plan,
    lora_options={"use_dora": True},
    plain_lora=False,
)
