"""Full fine-tuning: every weight trains. The reference of T (eq. 37)."""

from __future__ import annotations

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods.base import Context, Method


def plan(config: PlanConfig, context: Context) -> Plan:
    """No adapters."""
    return Plan(config.method, {}, context.blocks)


FULL = Method(
    name="full",
    title="Full fine-tuning, the reference of T",
    changes="every weight",
    plain_lora=False,
    plan=plan,
)
