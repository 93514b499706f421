"""How methods stand to each other: K, T and KT of each over its seeds, and whether a difference is more than chance.

Beside these ratios of scores stand `kept` and `learned`, in nats: how much likelier the right answers to knowledge and to task
questions became than they were before. They say something where a model solves too few questions for a ratio.

One bootstrap for all: every resample draws questions, the same for every model. Where a method has several seeds, the chance of the
seeds is added: Student's t times the standard error over them. (Two or three seeds drawn with replacement would spread far too little.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from farss.artifacts import KINDS, Kind
from farss.maths.metrics import Array, balance, balances, bootstrap, interval, p_value
from farss.tasks.summary import Estimate, Outcomes, outcomes_of, read_scores

METRICS = ("K", "T", "KT", "kept", "learned")
Only = Callable[[str], bool]
"""Whether a question, by its id, counts."""


@dataclass(frozen=True)
class Entry:
    """One run: its folder, and that of the full fine-tuning run it is compared with for T, if there is one."""

    folder: Path
    full: Path | None


@dataclass(frozen=True)
class Standing:
    """One method."""

    estimates: dict[str, Estimate]
    """Of `METRICS`: the mean over the seeds with a 95 % interval over questions and seeds; what has no value is left out."""
    draws: dict[str, Array]
    """The resamples behind them, [resamples]."""


def standings(
    base: Path,
    methods: Mapping[str, Sequence[Entry]],
    resamples: int,
    seed: int,
    only: Only | None = None,
    kinds: Sequence[Kind] = ("knowledge", "task"),
) -> dict[str, Standing]:
    """K, T and KT of every method from the per-question records of its runs.

    Args:
        base: folder of the untouched model's scores.
        methods: the runs of each method, one a seed.
        only: which questions count; None: all.
        kinds: of questions; K and `kept` come from knowledge, T and `learned` from the task.

    Raises:
        FolderError: scores are missing, or runs answered different questions.
    """
    everyone = [entry for group in methods.values() for entry in group]
    own = dict.fromkeys([base, *(entry.folder for entry in everyone)])
    with_full = own | dict.fromkeys(entry.full for entry in everyone if entry.full)
    read = {folder: read_scores(folder) for folder in with_full}
    generator = np.random.default_rng(seed + 1)
    chance = {method: _chance(len(entries), resamples, generator) for method, entries in methods.items()}
    found: dict[str, dict[str, Array]] = {method: {} for method in methods}
    for kind in kinds:
        letter, nats = ("K", "kept") if kind == "knowledge" else ("T", "learned")
        folders = [*(own if letter == "K" else with_full)]  # K needs no full fine-tuning, which may have been asked the task alone
        place = {folder: index for index, folder in enumerate(folders)}
        outcomes = _outcomes([read[folder] for folder in folders], kind, only)
        scores = _means([each.scores for each in outcomes], resamples, seed)
        changes = _means([gold for each in outcomes if (gold := _changes(each.gold)).size], resamples, seed)
        for method, group in methods.items():
            places = [place[entry.folder] for entry in group]
            if scores and (letter == "K" or all(entry.full is not None for entry in group)):
                below = [0 if letter == "K" or entry.full is None else place[entry.full] for entry in group]
                with np.errstate(divide="ignore", invalid="ignore"):  # what has no value is left out below
                    ratios = [each[:, places] / each[:, below] for each in scores]
                found[method][letter] = np.mean(ratios, axis=0)
            if changes:
                found[method][nats] = np.mean([each[:, places] for each in changes], axis=0)
    return {method: _standing(letters, chance[method]) for method, letters in found.items()}


def _outcomes(runs: list[Any], kind: Kind, only: Only | None) -> list[Outcomes]:
    """Each benchmark of a kind that every run was asked."""
    names = [name for name in getattr(runs[0][0], kind) if all(name in getattr(run[0], kind) for run in runs)]
    return [outcomes_of(name, kind, runs, only) for name in names]


def _changes(gold: Array) -> Array:
    """`[models, questions]`: how much likelier the right answer is than before, where every model has a likelihood."""
    known: Array = gold[:, np.isfinite(gold).all(axis=0)]
    return known - known[:1]


def _means(outcomes: list[Array], resamples: int, seed: int) -> list[Array]:
    """For each benchmark `[1 + resamples, models]`: the mean over its questions, and over those of each resample."""
    drawn = bootstrap(outcomes, resamples, seed)
    return [np.vstack([each.mean(axis=1), draws]) for each, draws in zip(outcomes, drawn, strict=True)]


def _chance(seeds: int, resamples: int, generator: np.random.Generator) -> Array:
    """`[resamples]`: by how many standard deviations over the seeds their mean may be off; nothing is known of a single seed."""
    return generator.standard_t(seeds - 1, resamples) / math.sqrt(seeds) if seeds > 1 else np.zeros(resamples)


def _standing(metrics: dict[str, Array], chance: Array) -> Standing:
    """The means over the seeds.

    Args:
        metrics: for each metric `[1 + resamples, seeds]`: the value of each seed, and its resamples.
        chance: from `_chance`.
    """
    known = {metric: each for metric, each in metrics.items() if np.isfinite(each[0]).all()}
    values = {metric: float(each[0].mean()) for metric, each in known.items()}
    draws = {metric: each[1:].mean(axis=1) for metric, each in known.items()}
    if {"K", "T"} <= set(known):
        values["KT"], draws["KT"] = balance(values["K"], values["T"]), balances(draws["K"], draws["T"])
        known["KT"] = balances(known["K"], known["T"])
    if chance.any():
        draws = {metric: each + chance * known[metric][0].std(ddof=1) for metric, each in draws.items()}
    for ratio in {"K", "T", "KT"} & set(draws):
        draws[ratio] = draws[ratio].clip(min=0)
    return Standing({metric: Estimate(values[metric], *interval(each)) for metric, each in draws.items()}, draws)


def mean_scores(folder: Path, only: Only | None = None, kinds: Sequence[Kind] = KINDS) -> dict[str, float]:
    """Mean score of a run on every benchmark of these kinds.

    Args:
        only: which questions count; None: all.
    """
    run = read_scores(folder)
    return {name: float(outcomes_of(name, kind, [run], only).scores.mean()) for kind in kinds for name in getattr(run[0], kind)}


def task_score(folder: Path, only: Only | None = None) -> float:
    """Mean score of a run over its task benchmarks."""
    return float(np.mean([*mean_scores(folder, only, ("task",)).values()]))


def differences(found: dict[str, Standing], reference: str = "lora") -> list[dict[str, Any]]:
    """Every metric of every method against `reference` and against the best other method.

    Returns:
        `{method, against, metric, value, low, high, p_value}` each; full fine-tuning, the reference of T, is no rival.
    """
    rows = []
    rivals = {method: standing for method, standing in found.items() if method.partition("@")[0] != "full"}
    for method, own in rivals.items():
        for metric in METRICS:
            others = {name: other for name, other in rivals.items() if name != method and metric in other.estimates}
            if metric not in own.estimates or not others:
                continue
            best = max(others, key=lambda name: others[name].estimates[metric].value)
            for against in dict.fromkeys([*([reference] if reference in others else []), best]):
                gap = own.draws[metric] - others[against].draws[metric]
                value = own.estimates[metric].value - others[against].estimates[metric].value
                estimate = Estimate(value, *interval(gap))
                rows.append({"method": method, "against": against, "metric": metric, **asdict(estimate), "p_value": p_value(gap)})
    return rows
