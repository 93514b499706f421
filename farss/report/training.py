"""Pictures of the training: its loss, and what became of knowledge and task on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

from farss.report.figures import Choice, Figure, Trace, line, thinned
from farss.report.words import is_number, label, significant

CURVE_POINTS = 600


class Log(NamedTuple):
    """What one run logged while it trained."""

    method: str
    name: str
    entries: list[dict[str, Any]]
    """Losses and learning rates."""
    looks: list[dict[str, Any]]
    """What was seen of knowledge and task on the way."""


def log_of(method: str, name: str, train: dict[str, Any]) -> Log:
    """The log in a `train.json`."""
    return Log(method, name, train.get("log") or [], train.get("course") or [])


def loss_figure(logs: list[Log]) -> Figure | None:
    """Training loss of one run (with its learning rate) or of several, one colour a method; None when nothing was logged."""
    methods = list(dict.fromkeys(log.method for log in logs))
    data = [_loss_line(log, points, methods.index(log.method)) for log in logs if (points := _curve(log.entries, "loss"))]
    if not data:
        return None
    data = _once(data)
    layout: dict[str, Any] = {
        "height": 400,
        "showlegend": len(data) > 1,
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "loss (nats per token)"}, "rangemode": "tozero"},
    }
    rate = _curve(logs[0].entries, "learning_rate") if len(logs) == 1 else []
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


def _loss_line(log: Log, points: list[tuple[Any, float | None]], place: int) -> Trace:
    """A click on the legend hides all seeds of a method."""
    drawn = line(log.name, points, place, f"{label(log.name)} step %{{x}}: %{{y:.4g}}")
    return {**drawn, "mode": "lines", "legendgroup": label(log.method)}


def _once(lines: list[Trace]) -> list[Trace]:
    """One entry of the legend a method, whatever the number of its seeds, which have one colour anyway."""
    first = {trace["legendgroup"]: place for place, trace in reversed([*enumerate(lines)])}
    if len(first) == len(lines):
        return lines
    return [{**trace, "name": (of := trace["legendgroup"]), "showlegend": first[of] == place} for place, trace in enumerate(lines)]


def _curve(log: list[dict[str, Any]], key: str) -> list[tuple[Any, float | None]]:
    found = [(entry.get("step"), significant(entry.get(key), 5)) for entry in log if is_number(entry.get(key))]
    return thinned(found, CURVE_POINTS)


def course_figure(logs: list[Log]) -> Figure | None:
    """How likely some right answers were on the way: every set in one picture for one run; for several runs a picture a set,
    with one colour a method. None where nobody looked."""
    sets = list(dict.fromkeys((kind, name) for log in logs for entry in log.looks for kind, name in _sets(entry)))
    if not sets:
        return None
    layout = {
        "height": 400,
        "showlegend": True,
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "log-likelihood (nats per token)"}},
    }
    title = "Kept and learned on the way"
    if len(logs) == 1:
        data = [_course_line(logs[0], kind, name, _title(kind, name), place) for place, (kind, name) in enumerate(sets)]
        return Figure("course", title, [Choice("", data, layout)])
    methods = list(dict.fromkeys(log.method for log in logs))
    choices = [
        Choice(_title(kind, name), _once([_course_line(log, kind, name, log.name, methods.index(log.method)) for log in logs]), layout)
        for kind, name in sets
    ]
    return Figure("course", title, choices, "Set")


def _title(kind: str, name: str) -> str:
    return name if kind == "text" else f"{name} ({kind})"


def _sets(entry: dict[str, Any]) -> list[tuple[str, str]]:
    return [(kind, name) for kind, found in entry.items() if isinstance(found, dict) for name in found]


def _course_line(log: Log, kind: str, name: str, title: str, place: int) -> Trace:
    points = [(entry.get("step"), (entry.get(kind) or {}).get(name)) for entry in log.looks]
    found = [(step, significant(value, 5)) for step, value in points if is_number(value)]
    return {**line(title, found, place, f"{label(title)}, step %{{x}}: %{{y:.4g}}"), "legendgroup": label(log.method)}
