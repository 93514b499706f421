"""What each method made of the model, as a table."""

from __future__ import annotations

from typing import Any

from farss.report.words import compact, interval, points, signed

Rows = list[dict[str, Any]]
DENSE = "dense"
"""Name of the whole model, the first row."""


def columns(rows: Rows) -> list[tuple[str, list[str]]]:
    """The heads of the table and their cells, those with something in them."""
    benchmarks = list(dict.fromkeys(each["name"] for row in rows for each in _benchmarks(row)))
    found = [
        ("Method", [row["method"] for row in rows]),
        ("Deleted blocks", [", ".join(map(str, row["deleted"])) for row in rows]),
        ("Parameters", [compact(row["parameters"]) for row in rows]),
        ("Perplexity", [f"{row['perplexity']:.2f}" if "perplexity" in row else "" for row in rows]),
        ("Text (nats)", [_signed((row.get("summary") or {}).get("forgetting")) for row in rows]),
        ("K %", [_with_interval((row.get("summary") or {}).get("K")) for row in rows]),
        ("Still right %", [_with_interval((row.get("summary") or {}).get("retained")) for row in rows]),
        *((f"{name} %", [_score(rows, row, name) for row in rows]) for name in benchmarks),
        *((f"Tokens/s, {text}", [_speed(row, what) for row in rows]) for what, text in (("prompt", "reading"), ("generation", "writing"))),
    ]
    return [(head, cells) for head, cells in found if any(cells)]


def markdown(rows: Rows) -> str:
    """The table, and under it what each method does."""
    found = columns(rows)
    lines = ["| " + " | ".join(head for head, _ in found) + " |", "| --- |" + " ---: |" * (len(found) - 1)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*(cells for _, cells in found), strict=True)]
    lines += ["", *(f"- {row['method']}: {row['text']}." for row in rows)]
    return "\n".join(lines) + "\n"


def _benchmarks(row: dict[str, Any]) -> list[dict[str, Any]]:
    return (row.get("summary") or {}).get("benchmarks") or []


def _score(rows: Rows, row: dict[str, Any], name: str) -> str:
    """A benchmark's score with its interval; of the whole model that which the others are compared with."""
    key = ("after", "low", "high") if "summary" in row else ("before", "before_low", "before_high")
    each = next((each for one in ([row] if "summary" in row else rows) for each in _benchmarks(one) if each["name"] == name), None)
    return _with_interval(dict(zip(("value", "low", "high"), (each[one] for one in key), strict=True))) if each else ""


def _with_interval(estimate: dict[str, Any] | None) -> str:
    return f"{points(estimate['value'])} ({interval(estimate['low'], estimate['high'])})" if estimate else ""


def _signed(value: float | None) -> str:
    return signed(value) if value is not None else ""


def _speed(row: dict[str, Any], what: str) -> str:
    """How much faster than the whole model beside it."""
    both = row.get("tokens_per_second")
    if not both:
        return ""
    own, dense = (both[name][what] for name in (row["method"], DENSE))
    return f"{own:,.0f} ({own / dense:.2f}x)"
