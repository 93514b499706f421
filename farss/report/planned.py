"""The plan as a picture: rank and side of every layer, and what the ranks cost."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from farss.artifacts import LayerPlan, Plan, Survey
from farss.report.figures import SIDES, Choice, Figure, Trace, boundary_marks, layer_types, start_text
from farss.report.words import compact, count, label, percent, plain

STRIP, GAP, ROW = 104, 16, 34
"""Pixels of the plan's picture: the strip of parameters, the space below it, and one row of layers."""


def plan_figure(plans: dict[str, tuple[Plan, Survey | None]]) -> Figure:
    """Layer types x blocks; the hue is the side, the strength the rank. Above them what each block costs, and beside them
    what each layer type costs, in trainable parameters.

    Args:
        plans: of each run, and the survey that it was made from, if there was one.
    """
    choices = [_plan_choice(name, plan, survey) for name, (plan, survey) in plans.items()]
    return Figure("plan", "Rank of every layer", choices, "Run", every=True)


def _plan_choice(name: str, plan: Plan, survey: Survey | None) -> Choice:
    types = layer_types({key: layer.block for key, layer in plan.layers.items()})
    rows = list(dict.fromkeys(types.values()))
    sides = [side for side in SIDES if any(layer.side == side for layer in plan.layers.values())]
    data = [_side_map(plan, types, rows, side, survey) for side in sides]
    ticks = {
        "tickvals": list(range(len(rows))),
        "ticktext": [label(row) for row in rows],
        "autorange": "reversed",
    }
    height = STRIP + GAP + ROW * len(rows)
    split = ROW * len(rows) / height
    marks = boundary_marks(plan.boundary, plan.blocks, above=True)
    layout = {
        "height": 90 + height,
        "barmode": "stack",
        "bargap": 0.12,
        "showlegend": True,
        "legend": {"traceorder": "normal", "itemclick": False, "itemdoubleclick": False},
        "margin": {"r": 62},
        "xaxis": {"title": {"text": "block"}, "showgrid": False, "range": [-0.5, plan.blocks - 0.5]},
        "yaxis": {**ticks, "showgrid": False, "automargin": True, "domain": [0, split]},
        "yaxis2": {
            "domain": [split + GAP / height, 1],
            "range": [0, 1.4 * max(_spent(plan))],
            "nticks": 3,
            "tickformat": "~s",
            "title": {"text": "parameters"},
        },
        "meta": {"columns": plan.blocks},
        **marks,
        "annotations": [*marks.get("annotations", []), *_type_totals(plan, types, rows)],
    }
    return Choice(name, [*data, *(_side_bars(plan, side) for side in sides)], layout)


def _spent(plan: Plan, sides: Collection[str | None] = tuple(SIDES)) -> list[int]:
    """Trainable parameters of every block, from the layers of some sides."""
    spent = [0] * plan.blocks
    for layer in plan.layers.values():
        spent[layer.block] += layer.parameters if layer.side in sides else 0
    return spent


def _side_bars(plan: Plan, side: str | None) -> Trace:
    """Trainable parameters of every block, in the colour of their side."""
    spent = _spent(plan, {side})
    return {
        "type": "bar",
        "name": start_text(next(layer for layer in plan.layers.values() if layer.side == side)),
        "x": list(range(plan.blocks)),
        "y": spent,
        "yaxis": "y2",
        "customdata": [f"{count(number, 'parameter')}, {percent(number / max(plan.parameters, 1))} of all" for number in spent],
        "marker": {"color": f"theme:{side or 'random'}-high"},
        "hovertemplate": "block %{x}: %{customdata}<extra></extra>",
    }


def _type_totals(plan: Plan, types: dict[str, str], rows: list[str]) -> list[dict[str, Any]]:
    """What each layer type costs in all blocks together, at the end of its row."""
    totals = dict.fromkeys(rows, 0)
    for name, layer in plan.layers.items():
        totals[types[name]] += layer.parameters
    beside = {"x": 1, "xref": "paper", "xanchor": "left", "xshift": 6, "yref": "y", "yanchor": "middle"}
    soft = {"showarrow": False, "font": {"color": "theme:soft", "size": 12}}
    return [{**beside, **soft, "y": place, "text": compact(total)} for place, total in enumerate(totals.values())]


def _side_map(plan: Plan, types: dict[str, str], rows: list[str], side: str | None, survey: Survey | None) -> Trace:
    ranks: list[list[int | None]] = [[None] * plan.blocks for _ in rows]
    hover: list[list[list[str]]] = [[[] for _ in range(plan.blocks)] for _ in rows]
    for name, layer in plan.layers.items():
        if layer.side == side:
            row = rows.index(types[name])
            ranks[row][layer.block] = layer.rank
            hover[row][layer.block] = _layer_words(name, layer, survey)
    shade = side or "random"
    return {
        "type": "heatmap",
        "z": ranks,
        "customdata": hover,
        "colorscale": [[0, f"theme:{shade}-low"], [1, f"theme:{shade}-high"]],
        "zmin": 0,
        "zmax": max((layer.rank for layer in plan.layers.values()), default=1),
        "showscale": False,
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "texttemplate": "%{z}",
        "hovertemplate": "%{customdata[0]}<br>rank %{z}, %{customdata[1]}<br>%{customdata[2]}<extra></extra>",
    }


def _layer_words(name: str, layer: LayerPlan, survey: Survey | None) -> list[str]:
    seen = survey.layers.get(name) if survey else None
    importance = f"importance {plain(seen.importance)}, " if seen else ""
    return [label(name), start_text(layer), importance + count(layer.parameters, "parameter")]
