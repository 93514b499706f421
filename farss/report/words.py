"""Numbers and texts as a reader sees them: one rounding for the page, the tables and the terminal."""

from __future__ import annotations

import html
import math
from typing import Any

NOTHING = "–"
SPACE = "\N{NO-BREAK SPACE}"
TEXT_LIMIT = 500


def is_number(value: Any) -> bool:
    """True for a finite int or float (and not for True)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits, a dash for nothing."""
    if not is_number(value):
        return NOTHING if value is None else cut(str(value), 80)
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def percent(value: Any) -> str:
    """0.9412 -> 94.1 %."""
    return f"{100 * value:.1f}{SPACE}%" if is_number(value) else NOTHING


def points(value: Any) -> str:
    """0.9412 -> 94.1: a percentage where the column's head has the unit."""
    return f"{100 * value:.1f}" if is_number(value) else NOTHING


def signed_points(value: Any) -> str:
    """A difference of percentages with its sign: -0.024 -> −2.4."""
    return f"{100 * value:+.1f}".replace("-", "−") if is_number(value) else NOTHING


def change(before: Any, after: Any) -> str:
    """Signed difference in percentage points."""
    return signed_points(after - before) if is_number(before) and is_number(after) else NOTHING


def interval(low: Any, high: Any) -> str:
    """0.92, 0.96 -> 92.0 to 96.0; empty when either end is missing."""
    return f"{points(low)} to {points(high)}" if is_number(low) and is_number(high) else ""


def signed_interval(low: Any, high: Any) -> str:
    """An interval of a difference: -0.004, 0.03 -> −0.4 to +3.0; empty when either end is missing."""
    return f"{signed_points(low)} to {signed_points(high)}" if is_number(low) and is_number(high) else ""


def signed(value: Any, digits: int = 3) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−") if is_number(value) else NOTHING


def compact(count: Any) -> str:
    """159907840 -> 159.9 M."""
    if not is_number(count):
        return NOTHING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.1f}{SPACE}{unit}"
    return f"{count:g}"


def duration(seconds: Any) -> str:
    """4350 -> 1 h 12 min."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 100:
        return f"{seconds:.1f}{SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes}{SPACE}min" if minutes < 100 else f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def gib(value: Any) -> str:
    """12.34 -> 12.3 GiB; small amounts in MiB or KiB."""
    if not is_number(value):
        return NOTHING
    unit = next((place for place in range(2) if value * 1024**place >= 1), 2)
    return f"{value * 1024**unit:.1f}{SPACE}{('GiB', 'MiB', 'KiB')[unit]}"


def count(number: int, noun: str, several: str = "") -> str:
    """1 block, 2 blocks."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {several or f'{noun}s'}"


def cut(text: str, limit: int = TEXT_LIMIT) -> str:
    """The first `limit` characters; the full length is stated when something was cut."""
    return text if len(text) <= limit else f"{text[:limit]}… [{len(text):,} characters]"


def reference_of(scores: dict[str, Any]) -> str:
    """What T is relative to, of a summary or a comparison."""
    return cut(str(scores.get("reference") or "full fine-tuning"), 40)


def cut_start(text: str, limit: int = TEXT_LIMIT) -> str:
    """The last `limit` characters: a prompt's question stands at its end."""
    return text if len(text) <= limit else f"[{len(text):,} characters] …{text[-limit:]}"


def label(text: Any) -> str:
    """A short text for a figure. Plotly reads labels as a small HTML with %{fields}, so both are escaped."""
    return html.escape(cut(str(text), 80), quote=False).replace("%{", "% {")


def significant(value: Any, digits: int = 4) -> float | None:
    """A number rounded to `digits` significant digits, so that pages stay small; None for NaN and infinity."""
    return float(f"{value:.{digits}g}") if is_number(value) else None


def positive(value: Any) -> float | None:
    """The same for a logarithmic axis, which has no place for zero."""
    return significant(value) if is_number(value) and value > 0 else None
