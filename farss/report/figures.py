"""Pictures of what was seen and decided, as plain plotly figures.

A colour is written as `theme:NAME`; the page's script puts the light or the dark colour of that name in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from farss.artifacts import LayerPlan, Plan, Survey
from farss.report.words import count, label, plain, positive, significant

Trace = dict[str, Any]
SIDES = {
    "least": "least important directions",
    "most": "most important directions",
    None: "random start",
}
SPECTRUM_POINTS = 160


class Choice(NamedTuple):
    """One state of a figure, chosen by its label."""

    label: str
    data: list[Trace]
    layout: dict[str, Any]


class Figure(NamedTuple):
    """A figure of the page; with several choices it gets a drop-down list."""

    name: str
    title: str
    choices: list[Choice]
    chooser: str = ""
    """What is chosen in the drop-down list."""


def layer_type(name: str, block: int) -> str:
    """What follows the block's index: model.layers.3.self_attn.q_proj -> self_attn.q_proj."""
    return f".{name}".partition(f".{block}.")[2] or name


def layer_types(blocks: dict[str, int]) -> dict[str, str]:
    """Layer name -> type, by its last word where that is clear (q_proj), from the layers' block indices."""
    full = {name: layer_type(name, block) for name, block in blocks.items()}
    short = {kind: kind.rpartition(".")[2] for kind in dict.fromkeys(full.values())}
    words = list(short.values())
    return {name: short[kind] if words.count(short[kind]) == 1 else kind for name, kind in full.items()}


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_figure(plans: dict[str, Plan], survey: Survey | None) -> Figure:
    """Layer types x blocks; the hue is the side, the strength the rank."""
    choices = [_plan_choice(name, plan, survey) for name, plan in plans.items()]
    return Figure("plan", "Rank of every layer", choices, "Run")


def _plan_choice(name: str, plan: Plan, survey: Survey | None) -> Choice:
    types = layer_types({key: layer.block for key, layer in plan.layers.items()})
    rows = list(dict.fromkeys(types.values()))
    data = [_side_map(plan, types, rows, side, survey) for side in SIDES]
    ticks = {
        "tickvals": list(range(len(rows))),
        "ticktext": [label(row) for row in rows],
        "autorange": "reversed",
    }
    layout = {
        "height": 96 + 34 * len(rows) + (22 if plan.boundary else 0),
        "xaxis": {"title": {"text": "block"}, "showgrid": False, "range": [-0.5, plan.blocks - 0.5]},
        "yaxis": {**ticks, "showgrid": False, "automargin": True},
        "meta": {"columns": plan.blocks},
        **boundary_marks(plan.boundary, plan.blocks, above=True),
    }
    return Choice(name, data, layout)


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
    return [label(name), SIDES[layer.side], importance + count(layer.parameters, "parameter")]


def boundary_marks(boundary: int | None, blocks: int, above: bool = False) -> dict[str, Any]:
    """A line between the shallow and the deep blocks, and their names above the plot or at its foot."""
    if boundary is None or not 0 < boundary < blocks:
        return {}
    line = {"type": "line", "x0": boundary - 0.5, "x1": boundary - 0.5, "yref": "paper", "y0": 0, "y1": 1}
    names = [("shallow", "right", -6), ("deep", "left", 6)]
    texts = [
        {
            "text": text,
            "x": boundary - 0.5,
            "xanchor": anchor,
            "xshift": shift,
            "yref": "paper",
            "y": int(above),
            "yanchor": "bottom",
        }
        for text, anchor, shift in names
    ]
    return {
        "shapes": [{**line, "line": {"color": "theme:ink", "width": 1, "dash": "dot"}}],
        "annotations": [{**text, "showarrow": False, "font": {"color": "theme:soft"}} for text in texts],
    }


# --- the survey ------------------------------------------------------------------------------------------------------


def importance_figure(survey: Survey, boundary: int | None) -> Figure:
    """Fisher importance by depth, one line a layer type."""
    types = layer_types({name: layer.block for name, layer in survey.layers.items()})
    data = []
    for place, kind in enumerate(dict.fromkeys(types.values())):
        layers = sorted((survey.layers[name] for name, own in types.items() if own == kind), key=lambda layer: layer.block)
        points = [(layer.block, positive(layer.importance)) for layer in layers]
        data.append(line(kind, points, place, f"{label(kind)}, block %{{x}}: %{{y:.3g}}"))
    axis = {"type": "log", "title": {"text": "importance"}, "exponentformat": "power", "dtick": 1}
    layout = {
        "height": 380,
        "xaxis": _block_axis(survey.blocks),
        "yaxis": axis,
        **boundary_marks(boundary, survey.blocks),
    }
    return Figure("importance", "Fisher importance by depth", [Choice("", data, layout)])


def energy_ratios(survey: Survey, top: int = 5) -> dict[int, float]:
    """Mean over a block's layers of the share of energy in the `top` largest singular values (FARSS, figure 1)."""
    shares: dict[int, list[float]] = {}
    for name, layer in survey.layers.items():
        energy = survey.directions(name).sigma.double().square()
        total = float(energy.sum())
        if total > 0:
            shares.setdefault(layer.block, []).append(float(energy[:top].sum()) / total)
    return {block: sum(values) / len(values) for block, values in sorted(shares.items())}


def energy_figure(survey: Survey, boundary: int | None) -> Figure:
    """The paper's figure 1 for this model."""
    points = [(block, significant(100 * ratio)) for block, ratio in energy_ratios(survey).items()]
    data = [line("top-5 energy", points, 0, "block %{x}: %{y:.3g} %")]
    axis = {"title": {"text": "energy in 5 directions, %"}, "rangemode": "tozero"}
    layout = {"height": 320, "showlegend": False, "xaxis": _block_axis(survey.blocks), "yaxis": axis}
    return Figure(
        "energy",
        "Energy concentration",
        [Choice("", data, {**layout, **boundary_marks(boundary, survey.blocks)})],
    )


def spectrum_figure(survey: Survey, plan: Plan | None) -> Figure:
    """The scores of one layer's singular directions; those that the plan starts from are marked."""
    choices = [_spectrum_choice(name, survey, plan.layers.get(name) if plan else None) for name in survey.layers]
    return Figure("spectrum", "Scores of the singular directions", choices, "Layer")


def _spectrum_choice(name: str, survey: Survey, layer: LayerPlan | None) -> Choice:
    scores = survey.directions(name).scores.tolist()
    chosen = [index for index in sorted(layer.directions) if index < len(scores)] if layer else []
    taken = set(chosen)
    rest = [index for index in range(len(scores)) if index not in taken]
    data = [_dots("not chosen", scores, thinned(rest, SPECTRUM_POINTS), "theme:faint", 4)]
    if layer and chosen:
        shade = f"theme:{layer.side or 'random'}-high"
        data.append(_dots(SIDES[layer.side], scores, thinned(chosen, SPECTRUM_POINTS), shade, 7))
    layout = {
        "height": 380,
        "xaxis": {"title": {"text": "singular direction, largest singular value first"}},
        "yaxis": {"type": "log", "title": {"text": "score"}, "exponentformat": "power", "dtick": 1},
    }
    return Choice(name, data, layout)


def _dots(name: str, scores: list[float], indices: list[int], colour: str, size: int) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": indices,
        "y": [positive(scores[index]) for index in indices],
        "marker": {"color": colour, "size": size},
        "hovertemplate": "direction %{x}: %{y:.3g}<extra></extra>",
    }


# --- parts -----------------------------------------------------------------------------------------------------------


def thinned(values: list[Any], most: int) -> list[Any]:
    """At most `most` values, evenly spaced, with both ends."""
    if len(values) <= most:
        return values
    step = (len(values) - 1) / (most - 1)
    return [values[round(place * step)] for place in range(most)]


def line(name: str, points: Iterable[tuple[Any, Any]], place: int, hover: str) -> Trace:
    """A line with dots in the `place`-th colour."""
    pairs = list(points)
    colour = f"theme:c{place % 8 + 1}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(pairs) <= 100 else "lines",
        "name": label(name),
        "x": [x for x, _ in pairs],
        "y": [y for _, y in pairs],
        "line": {"color": colour, "width": 2, "dash": "solid" if place < 8 else "dash"},
        "marker": {"color": colour, "size": 5},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def _block_axis(blocks: int) -> dict[str, Any]:
    return {"title": {"text": "block"}, "range": [-0.5, blocks - 0.5], "tickmode": "auto", "showgrid": False}
