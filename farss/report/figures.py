"""Pictures of what was seen and decided, as plain plotly figures.

A colour is written as `theme:NAME`; the page's script puts the light or the dark colour of that name in its place.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from farss.artifacts import LayerPlan, Plan, Survey
from farss.report.words import label, positive, significant

Trace = dict[str, Any]
SIDES = {
    "least": "least important directions",
    "most": "most important directions",
    None: "random start",
}
AGAINST = "directions of the task against knowledge"
"""Those of FARSS-plus, which trains B alone from zero."""
SPECTRUM_POINTS = 160
NAMES = ("balance", "frontier", "benchmarks", "boundary", "plan", "importance", "energy", "spectrum", "loss", "course")
"""Every figure that a page may have."""


def start_text(layer: LayerPlan) -> str:
    """Where the adapter of a layer starts."""
    if not layer.fixed_a:
        return SIDES[layer.side]
    return AGAINST if layer.side == "most" else f"{SIDES[layer.side]}, with A fixed"


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
    every: bool = False
    """Every choice is saved as a file, however many there are."""


def layer_type(name: str, block: int) -> str:
    """What follows the block's index: model.layers.3.self_attn.q_proj -> self_attn.q_proj."""
    return f".{name}".partition(f".{block}.")[2] or name


def layer_types(blocks: dict[str, int]) -> dict[str, str]:
    """Layer name -> type, by its last word where that is clear (q_proj), from the layers' block indices."""
    full = {name: layer_type(name, block) for name, block in blocks.items()}
    short = {kind: kind.rpartition(".")[2] for kind in dict.fromkeys(full.values())}
    words = list(short.values())
    return {name: short[kind] if words.count(short[kind]) == 1 else kind for name, kind in full.items()}


# --- the survey ------------------------------------------------------------------------------------------------------


def importance_figure(survey: Survey, boundary: int | None) -> Figure:
    """Fisher importance by depth, one line a layer type."""
    data = _type_lines(survey, {name: positive(layer.importance) for name, layer in survey.layers.items()}, "%{y:.3g}")
    axis = {"type": "log", "title": {"text": "importance"}, "exponentformat": "power", "dtick": 1}
    layout = {
        "height": 400,
        "xaxis": _block_axis(survey.blocks),
        "yaxis": axis,
        **boundary_marks(boundary, survey.blocks),
    }
    return Figure("importance", "Fisher importance by depth", [Choice("", data, layout)])


def energy_ratios(survey: Survey, top: int = 5) -> dict[str, float]:
    """Share of each layer's energy in its `top` largest singular values."""
    energies = {name: survey.directions(name).sigma.double().square() for name in survey.layers}
    return {name: float(energy[:top].sum() / energy.sum()) for name, energy in energies.items() if energy.sum() > 0}


def energy_figure(survey: Survey, boundary: int | None) -> Figure:
    """The paper's figure 1 for this model: the mean of each block's layers, and every layer type."""
    ratios = {name: significant(100 * ratio) for name, ratio in energy_ratios(survey).items()}
    blocks = _by_block(survey, ratios)
    means = [(block, significant(statistics.fmean(values))) for block, values in blocks.items()]
    data = [{**line("mean of all", means, 0, "mean, block %{x}: %{y:.3g} %"), "line": {"color": "theme:ink", "width": 4}}]
    data[0]["marker"] = {"color": "theme:ink", "size": 8}
    data += _type_lines(survey, ratios, "%{y:.3g} %")
    axis = {"title": {"text": "energy in 5 directions, %"}, "rangemode": "tozero"}
    layout = {"height": 400, "xaxis": _block_axis(survey.blocks), "yaxis": axis}
    return Figure(
        "energy",
        "Energy concentration",
        [Choice("", data, {**layout, **boundary_marks(boundary, survey.blocks)})],
    )


def _by_block(survey: Survey, values: dict[str, Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for name, value in values.items():
        found.setdefault(survey.layers[name].block, []).append(value)
    return dict(sorted(found.items()))


def _type_lines(survey: Survey, values: dict[str, Any], form: str) -> list[Trace]:
    """One line a layer type, by depth; `form` is the value in plotly's words."""
    types = layer_types({name: layer.block for name, layer in survey.layers.items()})
    found: dict[str, list[tuple[int, Any]]] = {kind: [] for kind in types.values()}
    for name, value in values.items():
        found[types[name]].append((survey.layers[name].block, value))
    return [
        line(kind, sorted(points, key=lambda point: point[0]), place, f"{label(kind)}, block %{{x}}: {form}")
        for place, (kind, points) in enumerate(found.items())
    ]


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
        data.append(_dots(start_text(layer), scores, thinned(chosen, SPECTRUM_POINTS), shade, 7))
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


def boundary_marks(boundary: int | None, blocks: int, above: bool = False) -> dict[str, Any]:
    """A line between the shallow and the deep blocks, and their names at the plot's head or foot."""
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
            "yanchor": "top" if above else "bottom",
        }
        for text, anchor, shift in names
    ]
    return {
        "shapes": [{**line, "line": {"color": "theme:ink", "width": 1, "dash": "dot"}}],
        "annotations": [{**text, "showarrow": False, "font": {"color": "theme:soft"}} for text in texts],
    }


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
