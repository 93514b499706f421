"""Where does shallow end? The candidates of the boundary search as a curve (FARSS, figures 5 and 6) and as a table."""

from __future__ import annotations

from typing import Any

from farss.artifacts import Plan
from farss.report.figures import Choice, Figure, Trace, line
from farss.report.results import bars
from farss.report.words import SPACE, compact, count, cut, interval, is_number, percent, plain, points, significant

KINDS = {"K": "knowledge K", "T": "task T"}

Candidates = list[dict[str, Any]]


def boundary_figure(found: dict[str, Any]) -> Figure | None:
    """KT of every candidate, one curve a round; K and T of the round with most of them; dropped ones crossed, the choice marked."""
    candidates = sorted(found.get("candidates") or [], key=lambda entry: entry["boundary"])
    if not candidates:
        return None
    *earlier, last = rounds(found)
    data = [_balance(one, "theme:c8", 1.5) for one in earlier] + [_balance(last, "theme:c1", 3)]
    data += [_kind(name, max([last, *earlier], key=len), place) for place, name in enumerate(KINDS, start=1)]
    dropped = [entry for entry in candidates if entry.get("dropped")]
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


def rounds(found: dict[str, Any]) -> list[Candidates]:
    """Candidates after the same number of steps, the shortest first: only those can be compared."""
    return [sorted(one, key=lambda entry: entry["boundary"]) for one in found["rounds"]]


def _percentages(candidates: Candidates, name: str) -> list[tuple[Any, float | None]]:
    return [(entry["boundary"], significant(100 * entry[name]) if is_number(entry.get(name)) else None) for entry in candidates]


def _line(name: str, candidates: Candidates, place: int, title: str) -> Trace:
    drawn = line(title, _percentages(candidates, name), place, f"boundary %{{x}}: {name} %{{y:.1f}} %, %{{customdata}}")
    return drawn | {"customdata": [_effort(entry) for entry in candidates]}


def _balance(candidates: Candidates, colour: str, width: float) -> Trace:
    spans = [{"value": entry.get("KT"), "low": entry.get("low"), "high": entry.get("high")} for entry in candidates]
    drawn = _line("KT", candidates, 0, f"KT after {_steps(candidates[0])}")
    look = {"line": {**drawn["line"], "color": colour, "width": width}, "marker": {"color": colour, "size": 4 + 2 * width}}
    return drawn | look | {"error_y": bars(spans, colour)}


def _kind(name: str, candidates: Candidates, place: int) -> Trace:
    drawn = _line(name, candidates, place, f"{KINDS[name]} after {_steps(candidates[0])}")
    return drawn | {"line": {**drawn["line"], "dash": "dot"}}


def _steps(candidate: dict[str, Any]) -> str:
    return count(candidate.get("steps") or 0, "step")


def _dropped(candidates: list[dict[str, Any]]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "dropped",
        "x": [entry["boundary"] for entry in candidates],
        "y": [y for _, y in _percentages(candidates, "KT")],
        "customdata": [_effort(entry) for entry in candidates],
        "marker": {"color": "theme:soft", "size": 13, "symbol": "x-thin-open", "line": {"width": 2}},
        "hovertemplate": "boundary %{x}: KT %{y:.1f} %, dropped after %{customdata}<extra></extra>",
    }


def _effort(candidate: dict[str, Any]) -> str:
    return f"{_steps(candidate)}, {count(candidate.get('parameters') or 0, 'parameter')}"


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
    sentences += _margin(found)
    sentences += [f"{name}: {found[kind]}." for name, kind in (("K", "knowledge"), ("T", "task")) if found.get(kind)]
    if is_number(found.get("cost_share")):
        whole = f" of {count(found['steps_full'], 'step')}" if is_number(found.get("steps_full")) else ""
        sentences.append(f"The search cost {percent(found['cost_share'])} of a full training{whole}.")
    return sentences


def _margin(found: dict[str, Any]) -> list[str]:
    """How clear the choice was."""
    if not is_number(found.get("margin")) or sum(not entry.get("dropped") for entry in found["candidates"]) < 2:
        return []
    between = interval(found.get("margin_low"), found.get("margin_high"))
    detail = f" (95{SPACE}% interval {between}, with other questions; another seed may choose otherwise)" if between else ""
    doubt = ": too little to tell them apart" if between and found["margin_low"] <= 0 else ""
    return [f"That is {points(found['margin'])} points above the next best{detail}{doubt}."]


def departure(chosen: Any, plan: Plan | None) -> str:
    """A sentence where the plan was made with another boundary than the search chose, else nothing."""
    if plan is None or chosen is None or plan.boundary == chosen:
        return ""
    made = f"it was made with {count(plan.boundary, 'shallow block')}" if plan.boundary else f"{cut(plan.method, 80)} has no shallow blocks"
    return f"The plan does not follow the search: {made}."


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
            **{name: points(entry.get(name)) for name in ("KT", *KINDS)},
        }
        for entry in sorted(found["candidates"], key=lambda entry: entry["boundary"])
    ]
