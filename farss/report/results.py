"""Pictures of what a training gave: benchmarks, and knowledge against task."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from farss.maths.metrics import balance
from farss.report.figures import Choice, Figure, Trace, line
from farss.report.tables import Value, benchmark_names, methods, standing
from farss.report.words import is_number, label, percent, significant

GRID = 41
LEARNED = "T: learned, % of {}"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")


def balance_figure(rows: list[dict[str, Any]], reference: str) -> Figure | None:
    """K against T, relative to `reference`, one colour a method, with intervals and lines of equal KT; None where no run has both."""
    placed = [row for row in rows if all(is_number((row.get(name) or {}).get("value")) for name in "KT")]
    if not placed:
        return None
    groups = methods({"rows": placed})
    dots = [_method_dots(name, groups[name], place) for place, name in enumerate(methods({"rows": rows})) if name in groups]
    x, y = (_span([row[name] for row in placed]) for name in "KT")
    layout = {
        "height": 520,
        "xaxis": {"title": {"text": "K: kept of the knowledge, %"}, "range": x, "showgrid": False},
        "yaxis": {"title": {"text": LEARNED.format(label(reference))}, "range": y, "showgrid": False},
    }
    return Figure("balance", "Knowledge against task", [Choice("", [_contours(x, y), *dots], layout)])


def frontier_figure(frontier: dict[str, Any] | None, reference: str) -> Figure | None:
    """K against T, relative to `reference`, of every method over its learning rates; None where none was tuned."""
    curves = (frontier or {}).get("curves", {})
    choices = [choice for axes in (SCORES, LIKELIHOODS) if (choice := frontier_choice(curves, axes, reference))]
    return Figure("frontier", "What each method can give", choices, "Measured by") if choices else None


class Axes(NamedTuple):
    """Two metrics of one kind."""

    title: str
    kept: str
    learned: str
    unit: str
    factor: float
    names: tuple[str, str]


SCORES = Axes("scores", "K", "T", "%", 100, ("K: kept of the knowledge, %", LEARNED))
LIKELIHOODS = Axes("log-likelihoods", "kept", "learned", "nats", 1, ("right answers to knowledge, nats", "right answers to the task, nats"))


def frontier_choice(curves: dict[str, Any], axes: Axes, reference: str) -> Choice | None:
    """The curves in two metrics; None where no run has both."""
    reached = {name: points for name, curve in curves.items() if (points := _reached(curve, axes))}
    if not reached:
        return None
    data = [trace for place, (name, points) in enumerate(reached.items()) for trace in _frontier_lines(name, points, place, axes)]
    every = [point for points in reached.values() for point in points]
    x, y = (_span([point[name] for point in every], axes.factor) for name in (axes.kept, axes.learned))
    layout = {
        "height": 520,
        "xaxis": {"title": {"text": axes.names[0]}, "range": x, "showgrid": False},
        "yaxis": {"title": {"text": axes.names[1].format(label(reference))}, "range": y, "showgrid": False},
    }
    return Choice(axes.title, [*([_contours(x, y)] if axes is SCORES else []), *data], layout)


def _reached(points: list[dict[str, Any]], axes: Axes) -> list[dict[str, Any]]:
    """The points that have both metrics, from the smallest learning rate to the largest."""
    placed = [point for point in points if all(is_number((point.get(name) or {}).get("value")) for name in (axes.kept, axes.learned))]
    return sorted(placed, key=lambda point: point["learning_rate"])


def _frontier_lines(method: str, points: list[dict[str, Any]], place: int, axes: Axes) -> list[Trace]:
    """One method, and a larger mark on the chosen learning rate."""

    def drawn(some: list[dict[str, Any]]) -> Trace:
        pairs = [tuple(significant(axes.factor * point[name]["value"]) for name in (axes.kept, axes.learned)) for point in some]
        values = f"{axes.kept} %{{x:.4g}} {axes.unit}, {axes.learned} %{{y:.4g}} {axes.unit}"
        found = line(method, pairs, place, f"{label(method)}, learning rate %{{customdata}}<br>{values}")  # type: ignore[arg-type]
        found["marker"] |= {"size": 7, "symbol": symbol(place)}
        return {**found, "customdata": [f"{point['learning_rate']:g}" for point in some], "legendgroup": label(method)}

    chosen = [point for point in points if point.get("chosen")]
    mark, colour = drawn(chosen), f"theme:c{place % 8 + 1}"
    named = (("error_x", axes.kept), ("error_y", axes.learned))
    spread = {side: bars([point[name] for point in chosen], colour, axes.factor) for side, name in named}
    large = {**mark["marker"], "size": 13}
    return [drawn(points), {**mark, "mode": "markers", "marker": large, **spread, "showlegend": False}]


def _span(values: list[dict[str, Any]], factor: float = 100) -> list[float]:
    """Axis range that holds all values, times a factor, and their intervals; no ratio is below 0."""
    numbers = [factor * value[part] for value in values for part in ("value", "low", "high") if is_number(value.get(part))]
    margin = max(0.02 * factor, 0.12 * (max(numbers) - min(numbers)))
    low = min(numbers) - margin
    return [max(0.0, low) if factor > 1 else low, max(numbers) + margin]


def _contours(x: list[float], y: list[float]) -> Trace:
    across, up = ([low + (high - low) * step / (GRID - 1) for step in range(GRID)] for low, high in (x, y))
    return {
        "type": "contour",
        "x": [significant(value, 5) for value in across],
        "y": [significant(value, 5) for value in up],
        "z": [[significant(balance(kept, learned), 4) for kept in across] for learned in up],
        "contours": {
            **_levels(x, y),
            "coloring": "none",
            "showlabels": True,
            "labelfont": {"color": "theme:soft", "size": 11},
            "labelformat": ".0f",
        },
        "line": {"color": "theme:faint", "width": 1},
        "showscale": False,
        "hoverinfo": "skip",
        "name": "equal KT",
    }


def _levels(x: list[float], y: list[float]) -> dict[str, float]:
    """At most 12 round values of KT inside the picture."""
    low, high = balance(x[0], y[0]), balance(x[1], y[1])
    size = next((size for size in (0.5, 1, 2, 5, 10, 20, 50, 100) if (high - low) / size <= 12), (high - low) / 12)
    return {"start": size * math.ceil(low / size), "end": size * math.floor(high / size), "size": size}


def _method_dots(method: str, rows: list[dict[str, Any]], place: int) -> Trace:
    colour = f"theme:c{place % 8 + 1}"
    kept, learned = ([row[name] for row in rows] for name in "KT")
    words = [f"seed {row.get('seed')}, KT {percent((row.get('KT') or {}).get('value'))}" for row in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(method),
        "x": [significant(100 * value["value"]) for value in kept],
        "y": [significant(100 * value["value"]) for value in learned],
        "error_x": bars(kept, colour),
        "error_y": bars(learned, colour),
        "customdata": [label(text) for text in words],
        "marker": {"color": colour, "size": 12, "symbol": symbol(place)},
        "hovertemplate": f"{label(method)}, %{{customdata}}<br>K %{{x:.1f}} %, T %{{y:.1f}} %<extra></extra>",
    }


def symbol(place: int) -> str:
    """The mark of a method: with the eight colours, another pair for each of 64."""
    return SYMBOLS[(place + place // 8) % 8]


def bars(values: list[dict[str, Any]], colour: str, factor: float = 100) -> dict[str, Any]:
    """Error bars of the 95 % intervals, times a factor; none where a run has no interval."""
    ends = [("high", factor), ("low", -factor)]
    up, down = ([_reach(entry, end, signed) for entry in values] for end, signed in ends)
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": colour,
        "thickness": 1.2,
        "width": 4,
    }


def _reach(entry: dict[str, Any], end: str, factor: float) -> float | None:
    known = is_number(entry.get("value")) and is_number(entry.get(end))
    return significant(max(0.0, factor * (entry[end] - entry["value"]))) if known else None


def benchmarks_figure(table: dict[str, Any]) -> Figure | None:
    """Every benchmark of a comparison: the untouched model and each method, with intervals."""
    names, groups, base = benchmark_names(table), methods(table), table.get("base") or {}
    if not names:
        return None
    before = {name: Value(base[name]) for name in names if is_number(base.get(name))}
    series = [("before", before)] if before else []
    series += [(method, {name: standing(table, method, f"benchmarks.{name}") for name in names}) for method in groups]
    step = 0.7 / len(series)
    top = 100 * max([entry.highest or entry.mean or 0 for _, values in series for entry in values.values()] + [0.01])
    data = [
        _benchmark_dots(name, values, names, (place - (len(series) - 1) / 2) * step, place - bool(before))
        for place, (name, values) in enumerate(series)
    ]
    layout = {
        "height": 110 + len(names) * (22 + 20 * len(series)),
        "xaxis": {"title": {"text": "score, %"}, "range": [-0.03 * top, 1.03 * top]},
        "yaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": [label(name) for name in names],
            "range": [len(names) - 0.5, -0.5],
            "showgrid": False,
        },
        "shapes": [_divider(place + 0.5) for place in range(len(names) - 1)],
    }
    return Figure("benchmarks", "Every benchmark", [Choice("", data, layout)])


def _benchmark_dots(name: str, values: dict[str, Value], names: list[str], shift: float, place: int) -> Trace:
    """The scores of one method, each a little below the one before; `place` is -1 for the untouched model."""
    found = [(names.index(bench), entry) for bench, entry in values.items() if entry.mean is not None]
    colour = "theme:soft" if place < 0 else f"theme:c{place % 8 + 1}"
    spans = [{"value": entry.mean, "low": entry.lowest, "high": entry.highest} for _, entry in found]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(name),
        "x": [significant(100 * span["value"]) for span in spans if span["value"] is not None],
        "y": [row + shift for row, _ in found],
        **({"error_x": bars(spans, colour)} if any(is_number(span["low"]) for span in spans) else {}),
        "customdata": [label(names[row]) for row, _ in found],
        "marker": {"color": colour, "size": 10, "symbol": "circle-open" if place < 0 else symbol(place)},
        "hovertemplate": f"{label(name)}, %{{customdata}}: %{{x:.1f}} %<extra></extra>",
    }


def _divider(y: float) -> dict[str, Any]:
    across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    return {**across, "line": {"color": "theme:grid", "width": 1}}
