"""Where does shallow end? The candidates of the boundary search as a curve (FARSS, figures 5 and 6) and as a table."""

from __future__ import annotations

from typing import Any

from farss.report.figures import Choice, Figure, Trace, line
from farss.report.results import bars
from farss.report.words import SPACE, compact, count, interval, is_number, percent, plain, points, significant

CURVES = {"KT": "balance KT", "K": "knowledge K", "T": "task T"}


def boundary_figure(found: dict[str, Any]) -> Figure | None:
    """K, T and KT of every candidate; those that were dropped early stand apart, the chosen one is marked."""
    candidates = sorted(found.get("candidates") or [], key=lambda entry: entry["boundary"])
    if not candidates:
        return None
    kept = [entry for entry in candidates if not entry.get("dropped")]
    dropped = [entry for entry in candidates if entry.get("dropped")]
    data = [_curve(name, kept, place) for place, name in enumerate(CURVES)]
    data += [_dropped(dropped)] if dropped else []
    numbers = [entry["boundary"] for entry in candidates]
    layout = {
        "height": 420,
        "xaxis": {
            "title": {"text": "boundary: number of shallow blocks"},
            "tickvals": numbers,
            "range": [numbers[0] - 0.5, numbers[-1] + 0.5],
            "showgrid": False,
        },
        "yaxis": {"title": {"text": "K, T and KT, %"}},
        **_chosen(found.get("chosen")),
    }
    return Figure("boundary", "Boundary search", [Choice("", data, layout)])


def _percentages(candidates: list[dict[str, Any]], name: str) -> list[tuple[Any, float | None]]:
    return [(entry["boundary"], significant(100 * entry[name]) if is_number(entry.get(name)) else None) for entry in candidates]


def _curve(name: str, candidates: list[dict[str, Any]], place: int) -> Trace:
    drawn = line(CURVES[name], _percentages(candidates, name), place, f"boundary %{{x}}: {name} %{{y:.1f}} %, %{{customdata}}")
    drawn |= {"mode": "lines+markers", "customdata": [_effort(entry) for entry in candidates]}
    if name == "KT":
        spans = [{"value": entry[name], "low": entry.get("low"), "high": entry.get("high")} for entry in candidates]
        return drawn | {"error_y": bars(spans, "theme:c1"), "line": {**drawn["line"], "width": 3}, "marker": {**drawn["marker"], "size": 9}}
    return drawn | {"line": {**drawn["line"], "dash": "dot"}}


def _dropped(candidates: list[dict[str, Any]]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "KT when dropped",
        "x": [entry["boundary"] for entry in candidates],
        "y": [y for _, y in _percentages(candidates, "KT")],
        "customdata": [_effort(entry) for entry in candidates],
        "marker": {"color": "theme:soft", "size": 9, "symbol": "x-thin-open", "line": {"width": 2}},
        "hovertemplate": "boundary %{x}: KT %{y:.1f} %, dropped after %{customdata}<extra></extra>",
    }


def _effort(candidate: dict[str, Any]) -> str:
    return f"{count(candidate.get('steps') or 0, 'step')}, {count(candidate.get('parameters') or 0, 'parameter')}"


def _chosen(boundary: Any) -> dict[str, Any]:
    if not is_number(boundary):
        return {}
    band = {"type": "line", "layer": "below", "x0": boundary, "x1": boundary, "yref": "paper", "y0": 0, "y1": 1}
    words = {"text": "chosen", "x": boundary, "xanchor": "center", "yref": "paper", "y": 0, "yanchor": "bottom"}
    return {
        "shapes": [{**band, "line": {"color": "theme:grid", "width": 44}}],
        "annotations": [{**words, "showarrow": False, "font": {"color": "theme:soft"}}],
    }


def boundary_sentences(found: dict[str, Any]) -> list[str]:
    """What was tried, what was chosen, and what the search cost."""
    candidates = found["candidates"]
    dropped = sum(bool(entry.get("dropped")) for entry in candidates)
    tried = f"{count(len(candidates), 'boundary', 'boundaries')} {'was' if len(candidates) == 1 else 'were'} tried with short trainings"
    sentences = [f"{tried}; {dropped or 'none'} of them {'was' if dropped == 1 else 'were'} dropped early."]
    best = next((entry for entry in candidates if entry["boundary"] == found.get("chosen")), None)
    if best:
        between = interval(best.get("low"), best.get("high"))
        detail = f" (95{SPACE}% interval {between}{SPACE}%)" if between else ""
        sentences.append(f"Chosen: {count(best['boundary'], 'shallow block')}, with KT {percent(best.get('KT'))}{detail}.")
    sentences += [f"{kind.capitalize()} was judged by {found[kind]}." for kind in ("knowledge", "task") if found.get(kind)]
    if is_number(found.get("cost_share")):
        whole = f" of {count(found['steps_full'], 'step')}" if is_number(found.get("steps_full")) else ""
        sentences.append(f"The search cost {percent(found['cost_share'])} of a full training{whole}.")
    return sentences


def boundary_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of candidates, as it is shown."""
    return [
        {
            "boundary": plain(entry["boundary"]),
            "chosen": entry["boundary"] == found.get("chosen"),
            "dropped": bool(entry.get("dropped")),
            "steps": plain(entry.get("steps")),
            "parameters": compact(entry.get("parameters")),
            "between": interval(entry.get("low"), entry.get("high")),
            **{name: points(entry.get(name)) for name in CURVES},
        }
        for entry in sorted(found["candidates"], key=lambda entry: entry["boundary"])
    ]
