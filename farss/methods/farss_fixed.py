"""FARSS with one rank in every shallow layer (FARSS, Figure 4)."""

from __future__ import annotations

import dataclasses

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods import farss
from farss.methods.base import SURVEY, Context, Method


def plan(config: PlanConfig, context: Context) -> Plan:
    """Rank `r_avg` in every shallow layer, whatever its importance: the same budget, spread evenly."""
    average, _ = config.shallow_budget
    return farss.plan(dataclasses.replace(config, r_min=average, r_avg=average, r_max=average), context)


FARSS_FIXED = Method(
    name="farss-fixed",
    title="FARSS, fixed shallow ranks (FARSS, Figure 4)",
    needs=SURVEY,
    changes="rank r_avg in every shallow layer, rank R in the deep ones, from FARSS's directions",
    plan=plan,
    boundary=True,
)
