"""FARSS with the most important directions at every depth (FARSS, Table 6)."""

from __future__ import annotations

import dataclasses

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods import farss
from farss.methods.base import Context, Method


def plan(config: PlanConfig, context: Context) -> Plan:
    """FARSS's ranks; shallow layers start from their most important directions too."""
    return farss.plan(dataclasses.replace(config, shallow_directions="most", deep_directions="most"), context)


FARSS_ALL_HIGH = Method(
    name="farss-all-high",
    title="FARSS, All-high (FARSS, Table 6)",
    needs="survey",
    changes="FARSS's ranks, starting from the most important directions in every block",
    plan=plan,
    boundary=True,
)
