"""The comparison as a table: one row a method (the mean over its seeds), one row a run in the CSV file."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from farss.config import is_reference, label_of_row
from farss.report.words import (
    NOTHING,
    compact,
    duration,
    gib,
    interval,
    is_number,
    plain,
    points,
    signed,
    signed_interval,
    signed_points,
)

METRICS = ("KT", "K", "T")
SIGNIFICANT = 0.05
"""A difference is a result where its p-value is below this."""
NATS = {"kept": "Knowledge (nats)", "learned": "Task (nats)"}


class Value(NamedTuple):
    """One number of the table."""

    mean: float | None
    """Mean over the method's seeds."""
    low: float | None = None
    """95 % interval, of methods with one run."""
    high: float | None = None
    deviation: float | None = None
    """Standard deviation over the seeds, of methods with several runs."""

    @property
    def lowest(self) -> float | None:
        """Lower end of the interval, or one deviation below the mean."""
        return self.low if self.deviation is None or self.mean is None else self.mean - self.deviation

    @property
    def highest(self) -> float | None:
        """Upper end of the interval, or one deviation above the mean."""
        return self.high if self.deviation is None or self.mean is None else self.mean + self.deviation


class Column(NamedTuple):
    """One column of the table."""

    key: str
    title: str
    form: Callable[[Any], str]
    better: int = 0
    """+1: the largest is the best; -1: the smallest; 0: no winner."""


class Cell(NamedTuple):
    """One cell as it is shown."""

    text: str
    detail: str = ""
    """The interval, or the deviation over the seeds; empty for costs."""
    place: int = 0
    """1: the best of its column; 2: the second best."""


def benchmark_names(comparison: dict[str, Any]) -> list[str]:
    """Names of all benchmarks, in the order in which the rows have them."""
    rows = comparison.get("rows", [])
    return list(dict.fromkeys(name for row in rows for name in row.get("benchmarks") or {}))


def columns(comparison: dict[str, Any]) -> list[Column]:
    """The columns for which there is at least one number."""
    wanted = [
        Column("parameters", "Parameters", compact),
        Column("effective_rank", "Effective rank", plain),
        Column("learning_rate", "Learning rate", plain),
        *(Column(name, f"{name} %", points, 1) for name in METRICS),
        Column("retained", "Still right %", points, 1),
        Column("recovered", "K recovered %", points, 1),
        Column("forgetting", "Forgetting", signed, -1),
        *(Column(f"benchmarks.{name}", f"{name} %", points, 1) for name in benchmark_names(comparison)),
        *(Column(name, title, signed, 1) for name, title in NATS.items()),
        Column("seconds_init", "Start", duration),
        Column("peak_memory_init_gib", "Start memory", gib),
        Column("seconds_train", "Training", duration),
        Column("peak_memory_gib", "Peak memory", gib),
    ]
    rows = comparison.get("rows", [])
    return [column for column in wanted if any(_read(row, column.key).mean is not None for row in rows)]


def methods(comparison: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each method."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in comparison.get("rows", []):
        found.setdefault(str(row.get("method", NOTHING)), []).append(row)
    return found


def rivals(comparison: dict[str, Any]) -> list[str]:
    """The methods that are compared with each other: what T is measured against is neither ranked nor marked. None while runs are missing
    without which nobody is ahead."""
    if not comparison.get("ranked", True):
        return []
    return [method for method in methods(comparison) if not is_reference(label_of_row(method))]


def labels(comparison: dict[str, Any]) -> list[str]:
    """The methods and variants, whatever the learning rate: before one is chosen, each has a row of its own."""
    return list(dict.fromkeys(label_of_row(method) for method in methods(comparison)))


def value(rows: list[dict[str, Any]], key: str) -> Value:
    """One column of one method, over its seeds."""
    values = [entry for row in rows if (entry := _read(row, key)).mean is not None]
    numbers = [entry.mean for entry in values if entry.mean is not None]
    if len(rows) == 1 and values:
        return values[0]
    if len(numbers) < len(rows):  # a mean over some of the seeds would not be comparable
        return Value(None)
    return Value(statistics.fmean(numbers), deviation=statistics.stdev(numbers))


def cells(comparison: dict[str, Any]) -> dict[str, list[Cell]]:
    """Every method's cells, in the order of `columns`."""
    groups = methods(comparison)
    result: dict[str, list[Cell]] = {method: [] for method in groups}
    for column in columns(comparison):
        values = {method: standing(comparison, method, column.key) for method in groups}
        texts = {method: column.form(entry.mean) for method, entry in values.items()}
        ranked = rivals(comparison)
        places = _places({method: values[method] for method in ranked}, texts, column.better)
        for method, entry in values.items():
            place = places.get(texts[method], 0) if method in ranked else 0
            result[method].append(Cell(texts[method], _detail(entry, column), place))
    return result


def standing(comparison: dict[str, Any], method: str, key: str) -> Value:
    """One column of one method: with its interval over questions and seeds where there is one (K, T, KT and nats)."""
    entry = (comparison.get("methods") or {}).get(method, {}).get(key)
    return Value(entry["value"], entry["low"], entry["high"]) if entry else value(methods(comparison)[method], key)


def frontier_points(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run of a tuned comparison's frontier, chosen or not; empty where no learning rate was tuned."""
    curves = (comparison.get("frontier") or {}).get("curves") or {}
    return [point for curve in curves.values() for point in curve]


def base_cells(comparison: dict[str, Any]) -> list[Cell]:
    """The untouched model's row, in the order of `columns`: it has benchmark scores only."""
    base = comparison.get("base") or {}
    keys = [column.key for column in columns(comparison)]
    names = [key.removeprefix("benchmarks.") if key.startswith("benchmarks.") else None for key in keys]
    return [Cell(NOTHING if name is None else points(base.get(name))) for name in names]


def _read(row: dict[str, Any], key: str) -> Value:
    group, _, name = key.partition(".")
    entry = (row.get(group) or {}).get(name) if name else row.get(key)
    if isinstance(entry, dict):
        number = entry.get("score", entry.get("value"))
        return Value(number, entry.get("low"), entry.get("high")) if is_number(number) else Value(None)
    return Value(entry) if is_number(entry) else Value(None)


def _places(values: dict[str, Value], texts: dict[str, str], better: int) -> dict[str, int]:
    """Place 1 and 2 by what is shown, so that equal numbers share a place."""
    numbers = {method: better * entry.mean for method, entry in values.items() if better and entry.mean is not None}
    if len(numbers) < 2:
        return {}
    order = list(dict.fromkeys(texts[method] for method in sorted(numbers, key=lambda method: -numbers[method])))
    return {text: place for place, text in enumerate(order[:2], start=1)}


def _detail(entry: Value, column: Column) -> str:
    if not column.better:
        return ""
    if entry.deviation is not None:
        return f"± {column.form(entry.deviation).lstrip('+')}"
    if column.form is points or entry.low is None or entry.high is None:
        return interval(entry.low, entry.high)
    return f"{column.form(entry.low)} to {column.form(entry.high)}"


def comparison_markdown(comparison: dict[str, Any]) -> str:
    """A Markdown table: one row a method, the best bold, the second best underlined; then what a reader must know to judge it."""
    heads = ["Method", *(column.title for column in columns(comparison))]
    lines = [_line(heads), _line(["---", *("---:" for _ in heads[1:])])]
    if comparison.get("base"):
        lines.append(_line(["(before)", *(cell.text for cell in base_cells(comparison))]))
    for method, row in cells(comparison).items():
        lines.append(_line([method, *(_markdown_cell(cell) for cell in row)], keep=True))
    notes = "\n".join(f"- {_escape(str(note))}" for note in comparison.get("notes") or [])
    parts = ["\n".join(lines), notes, _differences_markdown(comparison), _frontier_markdown(comparison)]
    return "\n\n".join(part for part in parts if part) + "\n"


class Gap(NamedTuple):
    """By how much one method exceeds another on the same questions, as it is shown."""

    method: str
    against: str
    text: str
    """Percentage points."""
    between: str
    """95 % interval."""
    p: str
    """Two-sided p-value."""


def gaps(comparison: dict[str, Any]) -> dict[str, list[Gap]]:
    """The paired differences of KT, K and T: each method against LoRA and against the best other method."""
    found: dict[str, list[Gap]] = {name: [] for name in METRICS}
    for row in comparison.get("differences") or []:
        if row.get("metric") in found:
            shown = signed_points(row.get("value")), signed_interval(row.get("low"), row.get("high")), _probability(row.get("p_value"))
            found[row["metric"]].append(Gap(str(row.get("method")), str(row.get("against")), *shown))
    return {name: rows for name, rows in found.items() if rows}


def _probability(p: Any) -> str:
    """With so many digits that it stands on its side of the threshold."""
    if not is_number(p):
        return NOTHING
    text = next(text for digits in range(3, 17) if (float(text := f"{p:.{digits}f}") < SIGNIFICANT) == (p < SIGNIFICANT))
    return "<0.001" if text == "0.000" else text


def gap_heads(metric: str) -> list[str]:
    """The heads of a table of differences."""
    return ["Method", "against", f"{metric} difference", "95 % interval", "p"]


def _differences_markdown(comparison: dict[str, Any]) -> str:
    ruler = _line(["---", "---", "---:", "---:", "---:"])
    tables = [[_line(gap_heads(metric)), ruler, *(_line([*gap]) for gap in rows)] for metric, rows in gaps(comparison).items()]
    return "\n\n".join("\n".join(lines) for lines in tables)


def _frontier_markdown(comparison: dict[str, Any]) -> str:
    """Every learning rate of every method, and the curves at equal learning."""
    frontier = comparison.get("frontier")
    if not frontier:
        return ""
    lines = [_line(["Method", "Learning rate", *(f"{name} %" for name in METRICS), *NATS.values()])]
    lines.append(_line(["---", *["---:"] * (1 + len(METRICS) + len(NATS))]))
    for method, curve in frontier["curves"].items():
        for point in curve:
            rate = f"{point['learning_rate']:g}{' (chosen)' if point['chosen'] else ''}"
            shown = [(points, name) for name in METRICS] + [(signed, name) for name in NATS]
            lines.append(_line([method, rate, *(form((point.get(name) or {}).get("value")) for form, name in shown)]))
    told = (
        "The frontier, of the first seed, with intervals over the questions. Where a curve begins beyond a level, or never falls to it, "
        f"its nearest point counts; {NOTHING}: it does not come so far, or not surely."
    )
    parts = [told, "\n".join(lines), _equals_markdown(frontier["scores"], "K", "T", "%", points)]
    parts.append(_equals_markdown(frontier["likelihoods"], "knowledge", "task", "nats", signed))
    return "\n\n".join(part for part in parts if part)


def _equals_markdown(found: dict[str, Any], kept: str, learned: str, unit: str, form: Callable[[Any], str]) -> str:
    """The curves where methods learned, or kept, equally much."""
    if not (found["learned"] or found["kept"]):
        return ""
    heads = [f"{kept} at {learned} {form(level)} {unit}" for level in found["learned"]]
    heads = ["Method", *heads, *(f"{learned} at {kept} {form(level)} {unit}" for level in found["kept"])]
    heads += [f"Area ({unit})"] if found["learned"] else []
    lines = [_line(heads), _line(["---", *("---:" for _ in heads[1:])])]
    for method, entry in found["methods"].items():
        found_there = [*entry["kept at learned"], *entry["learned at kept"], *entry["area"]]
        lines.append(_line([method, *(_read_off(value, form) for value in found_there)]))
    return "\n".join(lines)


def _read_off(found: dict[str, float] | None, form: Callable[[Any], str]) -> str:
    """A value that is read off a curve, with its interval."""
    return f"{form(found['value'])} ({form(found['low'])} to {form(found['high'])})" if found else NOTHING


def _line(texts: list[str], keep: bool = False) -> str:
    first, *rest = texts
    shown = [_escape(first), *(rest if keep else map(_escape, rest))]
    return f"| {' | '.join(shown)} |"


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _markdown_cell(cell: Cell) -> str:
    mark = {1: "**{}**", 2: "<u>{}</u>"}.get(cell.place, "{}")
    return f"{mark.format(cell.text)} ({cell.detail})" if cell.detail else mark.format(cell.text)


def comparison_csv(comparison: dict[str, Any]) -> str:
    """A CSV file: one row a run, every number with all its digits."""
    rows = [_flat(row) for row in comparison.get("rows", [])]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{K: {value, low, high}} -> {K, K_low, K_high}, and {benchmarks: {race: {score, low}}} -> {benchmarks.race, benchmarks.race:low}: a
    colon is in no benchmark's name, so that no two can clash."""
    flat: dict[str, Any] = {}
    for key, entry in row.items():
        if key == "benchmarks":
            flat |= _flat(entry or {}, "benchmarks.")
        elif isinstance(entry, dict):
            between = ":" if prefix else "_"
            names = {part: key if part in ("value", "score") else f"{key}{between}{part}" for part in entry}
            flat |= {f"{prefix}{names[part]}": number for part, number in entry.items()}
        else:
            flat[f"{prefix}{key}"] = "; ".join(map(str, entry)) if isinstance(entry, list) else entry
    return flat
