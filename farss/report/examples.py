"""Questions lost, won and kept: the same question before and after, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from farss.report.words import cut, cut_start

SHOWN = 8
GROUPS = {"lost": (True, False), "won": (False, True), "kept": (True, True), "never": (False, False)}


class Example(NamedTuple):
    """One question, cut to a readable length."""

    prompt: str
    gold: list[str]
    before: str
    after: str


class Group(NamedTuple):
    """All questions with the same fate."""

    name: str
    """lost, won, kept or never (right neither before nor after)."""
    total: int
    examples: list[Example]


def groups(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Group]:
    """Sort the questions that were asked both times by their fate; the first 8 of each are shown."""
    found: dict[str, list[Example]] = {name: [] for name in GROUPS}
    totals = dict.fromkeys(GROUPS, 0)
    for old, new in _pairs(before, after):
        name = next(name for name, fate in GROUPS.items() if fate == (_right(old), _right(new)))
        totals[name] += 1
        if totals[name] <= SHOWN and name != "never":
            found[name].append(_example(old, new))
    return [Group(name, totals[name], found[name]) for name in GROUPS]


def _pairs(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    known = {str(entry.get("id")): entry for entry in before}
    return ((known[str(entry.get("id"))], entry) for entry in after if str(entry.get("id")) in known)


def _right(entry: dict[str, Any]) -> bool:
    return (entry.get("score") or 0) >= 0.5


def _example(old: dict[str, Any], new: dict[str, Any]) -> Example:
    gold = new.get("gold") or []
    accepted = gold if isinstance(gold, list) else [gold]
    answers = (cut(str(entry.get("answer") or "").strip()) for entry in (old, new))
    return Example(
        cut_start(str(new.get("prompt") or "").strip()),
        [cut(str(text), 120) for text in accepted[:4]],
        *answers,
    )
