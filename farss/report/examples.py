"""Questions lost, won and kept: the same question before and after, side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

from farss.report.figures import thinned
from farss.report.words import cut, cut_start

SHOWN = 8
GROUPS = {"lost": (True, False), "won": (False, True), "kept": (True, True), "never": (False, False)}

Outcome = list[dict[str, Any]]


class Answer(NamedTuple):
    """What one model answered."""

    who: str
    text: str
    right: bool


class Example(NamedTuple):
    """One question, cut to a readable length."""

    prompt: str
    gold: list[str]
    answers: list[Answer]


class Group(NamedTuple):
    """All questions with the same fate."""

    name: str
    """lost, won, kept or never (right neither before nor after)."""
    total: int
    examples: list[Example]


def groups(before: Outcome, after: dict[str, Outcome]) -> list[Group]:
    """Sort the questions that all were asked by their fate; 8 of each are shown.

    Args:
        before: the untouched model's answers.
        after: the answers of one model or several; the first one decides what was lost and won.
    """
    asked = {who: {str(entry.get("id")): entry for entry in outcomes} for who, outcomes in {"before": before, **after}.items()}
    judge = next(iter(after))
    ids = [key for key in asked[judge] if all(key in entries for entries in asked.values())]
    frame = _frame([_prompt(asked["before"][key]) for key in ids])
    fates: dict[str, list[str]] = {name: [] for name in GROUPS}
    for key in ids:
        fate = (_right(asked["before"][key]), _right(asked[judge][key]))
        fates[next(name for name, own in GROUPS.items() if own == fate)].append(key)
    return [
        Group(name, len(keys), [_example({who: entries[key] for who, entries in asked.items()}, frame) for key in _shown(name, keys)])
        for name, keys in fates.items()
    ]


def _shown(name: str, keys: list[str]) -> list[str]:
    """Evenly spread over the questions: neighbours are often alike."""
    return [] if name == "never" else thinned(keys, SHOWN)


def _prompt(entry: dict[str, Any]) -> str:
    return str(entry.get("prompt") or "").strip()


def _right(entry: dict[str, Any]) -> bool:
    return (entry.get("score") or 0) >= 0.5


def _frame(prompts: list[str]) -> tuple[int, int]:
    """How many lines all prompts share at their start and at their end: the template, which says nothing."""
    if len(set(prompts)) < 2:
        return 0, 0
    lines = [prompt.split("\n") for prompt in prompts]
    start = _shared(lines)
    return start, _shared([part[start:][::-1] for part in lines])


def _shared(texts: list[list[str]]) -> int:
    """How many first lines are the same in all texts; at least one is left of each."""
    most = min(map(len, texts)) - 1
    return next((place for place in range(most) if len({text[place] for text in texts}) > 1), most)


def _example(answers: dict[str, dict[str, Any]], frame: tuple[int, int]) -> Example:
    asked = answers["before"]
    gold = asked.get("gold") or []
    accepted = gold if isinstance(gold, list) else [gold]
    lines = _prompt(asked).split("\n")
    start, end = frame
    return Example(
        cut_start("\n".join(lines[start : len(lines) - end]).strip()),
        [cut(str(text), 120) for text in accepted[:4]],
        [Answer(who, cut(str(entry.get("answer") or "").strip()), _right(entry)) for who, entry in answers.items()],
    )
