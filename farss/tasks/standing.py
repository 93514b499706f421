"""How methods stand to each other: K, T and KT of each over its seeds, and whether a difference is more than chance.

Beside these ratios of scores stand `kept` and `learned`, in nats: how much likelier the right answers to knowledge and to task
questions became than they were before. They say something where a model solves too few questions for a ratio.

One bootstrap for all: every resample draws questions, the same for every model. Where a method has several seeds, the chance of the
seeds is added: Student's t times the standard error over them. (Two or three seeds drawn with replacement would spread far too little.)
It is drawn for all methods with the same seeds at once, since what one seed does to several methods, by its rows and their order, is no
difference between them: their difference then spreads as that of their pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from farss.artifacts import KINDS, Kind
from farss.maths.metrics import Array, balance, balances, bootstrap, interval, simultaneous_p_values
from farss.tasks.summary import Estimate, Outcomes, outcomes_of, read_scores

METRICS = ("K", "T", "KT", "kept", "learned")
Only = Callable[[str], bool]
"""Whether a question, by its id, counts."""


@dataclass(frozen=True)
class Entry:
    """One run: its folder, and that of the full fine-tuning run it is compared with for T, if there is one."""

    folder: Path
    full: Path | None
    seed: int = 0
    """Runs of one seed saw the same rows in the same order."""


@dataclass(frozen=True)
class Standing:
    """One method."""

    estimates: dict[str, Estimate]
    """Of `METRICS`: the mean over the seeds with a 95 % interval over questions and seeds; what has no value is left out."""
    draws: dict[str, Array]
    """The resamples behind them, [resamples]; a ratio's may be below 0."""


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
    of_method = {method: tuple(entry.seed for entry in entries) for method, entries in methods.items()}
    chance = {own: _chance(len(own), resamples, generator) for own in dict.fromkeys(of_method.values())}
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
    return {method: _standing(letters, chance[of_method[method]]) for method, letters in found.items()}


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
    """`[resamples, seeds]`: weights with which the seeds' deviations from their mean say how far that may be off, a multivariate Student's
    t. The sum for one metric spreads as `t std / sqrt(seeds)`, and so does that for the difference of two. Nothing is known of a single
    seed."""
    if seeds == 1:
        return np.zeros((resamples, 1))
    normal = generator.standard_normal((resamples, seeds))
    return normal / np.sqrt(generator.chisquare(seeds - 1, (resamples, 1)) * seeds)


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
    draws = {metric: each + chance @ (known[metric][0] - known[metric][0].mean()) for metric, each in draws.items()}
    lowest = {metric: -math.inf if metric in ("kept", "learned") else 0.0 for metric in draws}
    estimates = {metric: Estimate(values[metric], *interval(each.clip(min=lowest[metric]))) for metric, each in draws.items()}
    return Standing(estimates, draws)


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

    The p-values hold for all methods at once: those against `reference` for as many as are compared with it, those against the best
    other for every pair there is, since the data say which is the best.

    Returns:
        `{method, against, metric, value, low, high, p_value}` each; full fine-tuning, the reference of T, is no rival.
    """
    rows = []
    rivals = {method: standing for method, standing in found.items() if method.partition("@")[0] != "full"}
    for metric in METRICS:
        known = [method for method, standing in rivals.items() if metric in standing.estimates]
        values = {method: rivals[method].estimates[metric].value for method in known}
        with_reference = [(method, reference) for method in known if reference in known and method != reference]
        for_reference, for_best = (_p_values(rivals, metric, pairs) for pairs in (with_reference, [*combinations(known, 2)]))
        for method in known:
            others = [name for name in known if name != method]
            best = max(others, key=values.__getitem__, default=method)
            for against in dict.fromkeys([*([reference] if reference in others else []), *([best] if others else [])]):
                gap = rivals[method].draws[metric] - rivals[against].draws[metric]
                p = (for_best if against == best else for_reference)[frozenset((method, against))]
                estimate = Estimate(values[method] - values[against], *interval(gap))
                rows.append({"method": method, "against": against, "metric": metric, **asdict(estimate), "p_value": p})
    return sorted(rows, key=lambda row: [*rivals].index(row["method"]))


def _p_values(found: dict[str, Standing], metric: str, pairs: Sequence[tuple[str, str]]) -> dict[frozenset[str], float]:
    """The p-value of every pair, for all of these at once."""
    if not pairs:
        return {}
    gaps = np.stack([found[one].draws[metric] - found[other].draws[metric] for one, other in pairs], axis=1)
    values = np.array([found[one].estimates[metric].value - found[other].estimates[metric].value for one, other in pairs])
    return {frozenset(pair): float(p) for pair, p in zip(pairs, simultaneous_p_values(gaps, values), strict=True)}
