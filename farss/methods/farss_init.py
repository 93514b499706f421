"""FARSS's start without its ranks and depths: the least important directions everywhere (FARSS, Table 4 and Figure 3)."""

from __future__ import annotations

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods.base import Context, Method, uniform_plan


def plan(config: PlanConfig, context: Context) -> Plan:
    """The directions with the lowest scores, in every layer."""
    return uniform_plan(config, context, "least")


FARSS_INIT = Method(
    name="farss-init",
    title="FARSS-init (FARSS, Table 4)",
    needs="survey",
    changes="one rank in every layer, starting from the least important directions",
    plan=plan,
)
