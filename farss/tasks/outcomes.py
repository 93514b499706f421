"""Answers of several runs to the same questions, lined up question by question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from farss.artifacts import Kind, Scores, TaskScore, read_records
from farss.errors import FolderError
from farss.files import read_json, reading
from farss.maths.metrics import Array

Only = Callable[[str], bool]
"""Whether a question, by its id, counts."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcomes:
    """One benchmark's outcomes, row by row of the same questions."""

    score: TaskScore
    kind: Kind
    scores: Array
    """`[models, questions]`, in the order of the runs: before, after and, where it was asked, full fine-tuning."""
    gold: Array
    """`[models, questions]` gold log-likelihoods; NaN where there is none."""

    @property
    def still(self) -> Array:
        """`scores`, of what the first model answers right: of an answer that is right in part no more than that part."""
        found: Array = np.minimum(self.scores, self.scores[:1])
        return found

    @property
    def known(self) -> Array:
        """`gold` of the questions where every model has one."""
        found: Array = self.gold[:, np.isfinite(self.gold).all(axis=0)]
        return found

    @property
    def gains(self) -> Array:
        """How much likelier (nats) the right answers of these are than before."""
        return self.known - self.known[:1]


def read_scores(folder: Path) -> tuple[Scores, Path]:
    """The scores and the folder of the per-question records; `folder` may also be the scores.json itself.

    Raises:
        FolderError: it is neither.
    """
    if folder.is_file() and folder.suffix != ".json":
        raise FolderError(f"{folder} holds no scores: name a scores.json, or the folder of one")
    path = folder if folder.suffix == ".json" else folder / "scores.json"
    return Scores.load(path), path.parent / "scores"


def how_asked(folder: Path, name: str) -> dict[str, int]:
    """How many tokens the answers to a benchmark could have, and by which of our rules they are graded; of older folders less is known."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    with reading(path, "score of a benchmark"):
        known = read_json(path)
        return {key: known[key] for key in ("max_tokens", "grading") if key in known}


def outcomes_of(name: str, kind: Kind, runs: Sequence[tuple[Scores, Path]], only: Only | None = None) -> Outcomes:
    """Line up one benchmark's records of several runs.

    Args:
        only: which questions count, by their ids; None: all.

    Raises:
        FolderError: the runs answered different questions, or were scored differently.
    """
    tables, first_how = [], how_asked(runs[0][1], name)
    for scores, folder in runs:
        records = {str(record["id"]): record for record in read_records(folder, name)}
        tables.append({key: record for key, record in records.items() if only is None or only(key)})
        metric, first = getattr(scores, kind)[name].metric, getattr(runs[0][0], kind)[name].metric
        asked, here = ({key: (record.get("prompt"), record["gold"]) for key, record in table.items()} for table in (tables[0], tables[-1]))
        if metric != first or list(asked.items()) != list(here.items()):
            raise FolderError(
                f"{folder} and {runs[0][1]} hold answers to different questions of {name!r}: evaluate both with the "
                "same question file, prompt, examples, limit, metric and seed"
            )
        how = how_asked(folder, name)
        for key in first_how.keys() & how.keys():
            if how[key] != first_how[key]:
                cure = "start the older run again, which grades it anew" if key == "grading" else "ask both with the same"
                was = f"{folder} holds answers to {name!r} with {key}={how[key]}, and {runs[0][1]} with {first_how[key]}"
                raise FolderError(f"{was}: {cure}")
    if not tables[0]:
        raise FolderError(f"no question of {name!r} is left to be scored: ask more questions, or change compare.held_out")
    scored = [[record["score"] for record in table.values()] for table in tables]
    gold_likelihoods = [[record["gold_loglikelihood"] for record in table.values()] for table in tables]
    return Outcomes(getattr(runs[0][0], kind)[name], kind, np.array(scored, float), np.array(gold_likelihoods, float))
