"""What is asked: every benchmark of a configuration, with its questions drawn and a hash of all that its result depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from farss.artifacts import KINDS, Kind
from farss.config import Config, QuestionSet
from farss.errors import ConfigError
from farss.files import fingerprint
from farss.prompts import prompt_facts
from farss.rows import example_rows, question_rows
from farss.tasks.grading import GRADING
from farss.tasks.questions import Drawn, draw, prompt_of

LONGEST = 200
"""Bytes of a name: what is written beside it (an ending, a number) fits into a file's 255 too."""


@dataclass(frozen=True)
class Benchmark:
    """One thing to ask."""

    kind: Kind
    name: str
    entry: str | QuestionSet
    drawn: Drawn | None
    """The questions of a question set; None for a task of lm_eval, which brings its own."""
    key: str
    """Hash of everything its result depends on."""
    earlier: tuple[str, ...] = ()
    """The keys of the same answers under the rules that graded them before."""


def list_benchmarks(config: Config, identity: dict[str, Any]) -> list[Benchmark]:
    """Every benchmark of the configuration, with its questions drawn, for the model of this identity.

    Raises:
        ConfigError: a name that cannot be a file name, or a question set that cannot be asked.
        DataError: its file, or a column of it, is missing.
    """
    return [_benchmark(kind, entry, config, identity) for kind in KINDS for entry in getattr(config.evaluate, kind)]


def _benchmark(kind: Kind, entry: str | QuestionSet, config: Config, identity: dict[str, Any]) -> Benchmark:
    name = entry if isinstance(entry, str) else entry.name
    if name.startswith(".") or set(name) & set('/\\:*?"<>|'):
        raise ConfigError(f"evaluate: {name!r} is also a file name: use letters, digits, - and _")
    if len(name.encode()) > LONGEST:
        raise ConfigError(f"evaluate: the name {name[:40] + '...'!r} is also a file name, and has {len(name):,} characters: shorten it")
    drawn: Drawn | None = None
    asked: Any = entry
    if isinstance(entry, QuestionSet):
        prompt_of(entry, kind, config.data, None)  # refuses what it cannot be
        rows, examples = question_rows(entry), example_rows(entry)
        drawn = draw(entry, rows, config.seed, examples)
        asked = {key: value for key, value in asdict(entry).items() if key != "split"} | {
            "data": fingerprint(rows),
            "examples": examples and fingerprint(examples),
        }
    depends = {
        "kind": kind,
        "entry": asked,
        "limit": config.evaluate.limit if isinstance(entry, str) else None,
        **prompt_facts(config.data),
        "identity": identity,
    }
    # before a right answer to a prompt that ends in white space stood another space once
    same = isinstance(entry, QuestionSet) and not (entry.prompt or "")[-1:].isspace()
    before = [{}, *({"grading": rules} for rules in range(2, GRADING))] if same else []
    earlier = tuple(fingerprint(depends | rules) for rules in before)
    return Benchmark(kind, name, entry, drawn, fingerprint(depends | grading([entry])), earlier)


def grading(entries: Sequence[str | QuestionSet]) -> dict[str, int]:
    """By which of our rules these are graded; nothing for lm_eval's tasks, which have their own."""
    read = any(isinstance(entry, QuestionSet) or entry.startswith("farss_") for entry in entries)
    return {"grading": GRADING} if read else {}
