"""Pictures of the training and of what it gave: loss curves, and knowledge against task."""

from __future__ import annotations

from typing import Any

from farss.report.figures import Choice, Figure, Trace, line, thinned
from farss.report.words import is_number, label, percent, significant

CURVE_POINTS = 600
GRID = 41


def loss_figure(logs: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Training loss of one run (with its learning rate) or of several; None when nothing was logged."""
    curves = {name: points for name, log in logs.items() if (points := _curve(log, "loss"))}
    if not curves:
        return None
    data = [
        {**line(name, points, place, f"{label(name)} step %{{x}}: %{{y:.4g}}"), "mode": "lines"}
        for place, (name, points) in enumerate(curves.items())
    ]
    layout: dict[str, Any] = {
        "height": 380,
        "showlegend": len(data) > 1,
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "loss (nats per token)"}},
    }
    rate = _curve(next(iter(logs.values())), "learning_rate") if len(logs) == 1 else []
    if rate:
        data.append({**line("learning rate", rate, 7, "step %{x}: %{y:.3g}"), "mode": "lines", "yaxis": "y2"})
        layout["yaxis"]["domain"] = [0.34, 1]
        layout["yaxis2"] = {
            "title": {"text": "learning rate"},
            "domain": [0, 0.22],
            "exponentformat": "power",
            "nticks": 3,
        }
        layout["xaxis"]["anchor"] = "y2"
    return Figure("loss", "Training loss", [Choice("", data, layout)])


def _curve(log: list[dict[str, Any]], key: str) -> list[tuple[Any, float | None]]:
    found = [(entry.get("step"), significant(entry.get(key), 5)) for entry in log if is_number(entry.get(key))]
    return thinned(found, CURVE_POINTS)


def harmonic_mean(kept: float, learned: float) -> float:
    """KT of K and T (FARSS, eq. 38)."""
    return 2 * kept * learned / (kept + learned) if kept + learned > 0 else 0.0


def balance_figure(rows: list[dict[str, Any]]) -> Figure | None:
    """K against T, one colour a method, with intervals and lines of equal KT; None where no run has both."""
    placed = [row for row in rows if all(is_number((row.get(name) or {}).get("value")) for name in "KT")]
    if not placed:
        return None
    methods = list(dict.fromkeys(str(row.get("method")) for row in placed))
    dots = [_method_dots(name, [row for row in placed if str(row.get("method")) == name], place) for place, name in enumerate(methods)]
    x, y = (_span([row[name] for row in placed]) for name in "KT")
    layout = {
        "height": 520,
        "xaxis": {"title": {"text": "K: kept of the knowledge, %"}, "range": x, "showgrid": False},
        "yaxis": {"title": {"text": "T: learned, % of full fine-tuning"}, "range": y, "showgrid": False},
    }
    return Figure("balance", "Knowledge against task", [Choice("", [_contours(x, y), *dots], layout)])


def _span(values: list[dict[str, Any]]) -> list[float]:
    """Axis range in percent that holds all values and their intervals."""
    numbers = [100 * value[part] for value in values for part in ("value", "low", "high") if is_number(value.get(part))]
    margin = max(2.0, 0.12 * (max(numbers) - min(numbers)))
    return [max(0.0, min(numbers) - margin), max(numbers) + margin]


def _contours(x: list[float], y: list[float]) -> Trace:
    across, up = ([low + (high - low) * step / (GRID - 1) for step in range(GRID)] for low, high in (x, y))
    return {
        "type": "contour",
        "x": [significant(value, 5) for value in across],
        "y": [significant(value, 5) for value in up],
        "z": [[significant(harmonic_mean(kept, learned), 4) for kept in across] for learned in up],
        "contours": {
            "coloring": "none",
            "showlabels": True,
            "labelfont": {"color": "theme:soft", "size": 11},
            "labelformat": ".0f",
        },
        "line": {"color": "theme:faint", "width": 1},
        "ncontours": 10,
        "showscale": False,
        "hoverinfo": "skip",
        "name": "KT",
    }


def _method_dots(method: str, rows: list[dict[str, Any]], place: int) -> Trace:
    colour = f"theme:c{place % 8 + 1}"
    kept, learned = ([row[name] for row in rows] for name in "KT")
    symbols = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
    words = [f"seed {row.get('seed')}, KT {percent((row.get('KT') or {}).get('value'))}" for row in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(method),
        "x": [significant(100 * value["value"]) for value in kept],
        "y": [significant(100 * value["value"]) for value in learned],
        "error_x": _bars(kept, colour),
        "error_y": _bars(learned, colour),
        "customdata": [label(text) for text in words],
        "marker": {"color": colour, "size": 12, "symbol": symbols[place % 8]},
        "hovertemplate": f"{label(method)}, %{{customdata}}<br>K %{{x:.1f}} %, T %{{y:.1f}} %<extra></extra>",
    }


def _bars(values: list[dict[str, Any]], colour: str) -> dict[str, Any]:
    """Error bars of the 95 % intervals; none where a run has no interval."""
    up = [significant(100 * (v["high"] - v["value"])) if is_number(v.get("high")) else None for v in values]
    down = [significant(100 * (v["value"] - v["low"])) if is_number(v.get("low")) else None for v in values]
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": colour,
        "thickness": 1.2,
        "width": 4,
    }
