"""How methods stand to each other: K, T and KT of each over its seeds, and whether a difference is more than chance.

Beside these ratios of scores stand `kept` and `learned`, in nats: how much likelier the right answers to knowledge and to task
questions became than they were before. They say something where a model solves too few questions for a ratio.

One bootstrap for all: every resample draws questions, the same for every model. Where a method has several seeds, the chance of the
seeds is added: Student's t times the standard error over them. (Two or three seeds drawn with replacement would spread far too little.)
Where methods are compared, what a seed does to all of them, by its rows and their order, is no difference between them, and how far
they scatter beside it is taken from all of them together, as in an analysis of variance of methods by seeds (Tukey's test): of two or
three seeds of a single pair hardly anything is known. It supposes that they scatter alike.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from farss.artifacts import KINDS, Kind
from farss.config import Config, is_reference
from farss.maths.metrics import Array, balance, balances, interval, mean_ratios, observed_and_resampled, simultaneous_p_values, t_quantiles
from farss.tasks.outcomes import Estimate, Only, Outcomes, outcomes_of, read_scores

NATS = ("kept", "learned")
METRICS = ("K", "T", "KT", "retained", *NATS)
Draw = Callable[[list[Array]], list[Array]]
"""`[models, questions]` of each benchmark -> `[1 + resamples, models]`, the same draws for all that it is called with."""


@dataclass(frozen=True)
class Entry:
    """One run: its folder, and that of the full fine-tuning run it is compared with for T, if there is one."""

    folder: Path
    full: Path | None
    seed: int = 0
    """Runs of one seed saw the same rows in the same order."""


Methods = Mapping[str, Sequence[Entry]]
"""The runs of each method, one a seed."""


@dataclass(frozen=True)
class Standing:
    """One method."""

    estimates: dict[str, Estimate]
    """Of `METRICS`: the mean over the seeds with a 95 % interval over questions and seeds; what has no value is left out."""
    draws: dict[str, Array]
    """The resamples of the questions behind them, [resamples], which hold nothing of the chance of the seeds."""
    of_seed: dict[str, dict[int, float]]
    """The value of each seed."""
    benchmarks: dict[str, Estimate] = field(default_factory=dict)
    """The score on each of them, with the same chances."""


def standings(
    base: Path,
    methods: Methods,
    config: Config,
    only: Only | None = None,
    kinds: Sequence[Kind] = KINDS,
) -> dict[str, Standing]:
    """K, T and KT of every method from the per-question records of its runs.

    Args:
        base: folder of the untouched model's scores.
        methods: the runs of each method, one a seed.
        config: its `seed` and `evaluate` (resamples, and what T is made of).
        only: which questions count; None: all.
        kinds: of questions; K and `kept` come from knowledge, T and `learned` from the task, nothing but their own scores from others.

    Raises:
        FolderError: scores are missing, or runs answered different questions.
    """
    everyone = [entry for group in methods.values() for entry in group]
    own = dict.fromkeys([base, *(entry.folder for entry in everyone)])
    read = {folder: read_scores(folder) for folder in own}
    tasks = _names([*read.values()], "task")
    for full in dict.fromkeys(entry.full for entry in everyone if entry.full and entry.full not in own):
        reference = read_scores(full)
        if all(name in reference[0].task for name in tasks):  # or T would be of fewer questions than everything else
            read[full] = reference
    found: dict[str, dict[str, Array]] = {method: {} for method in methods}
    scored: dict[str, dict[str, Array]] = {method: {} for method in methods}
    for kind in kinds:
        # the task alone needs full fine-tuning, which may have been asked nothing else, or other questions
        folders = [*(read if kind == "task" else own)]
        outcomes = _outcomes([read[folder] for folder in folders], kind, only)
        draw = partial(observed_and_resampled, resamples=config.evaluate.resamples, seed=stream_of(config.seed, kind))
        place = {folder: index for index, folder in enumerate(folders)}
        scores = draw([each.scores for each in outcomes])
        for method, group in methods.items():
            places = [place[entry.folder] for entry in group]
            scored[method] |= {each.score.name: drawn[:, places] for each, drawn in zip(outcomes, scores, strict=True)}
        if kind == "knowledge":
            metrics = _of_knowledge(outcomes, scores, draw, methods, place)
        elif kind == "task":
            metrics = _of_task(outcomes, scores, draw, methods, place, config.evaluate.learned_by == "likelihood")
        else:
            continue
        for method in methods:
            found[method] |= metrics[method]
    of_group = {method: [entry.seed for entry in group] for method, group in methods.items()}
    return {method: _standing(method, found[method], seeds, scored[method]) for method, seeds in of_group.items()}


def _of_knowledge(
    outcomes: list[Outcomes], scores: list[Array], draw: Draw, methods: Methods, place: dict[Path, int]
) -> dict[str, dict[str, Array]]:
    """K, what is still right, and how much likelier right answers became, of every method `[1 + resamples, seeds]`."""
    found, still, gains = {}, draw([each.still for each in outcomes]), _gains(outcomes, draw)
    for method, group in methods.items():
        places = [place[entry.folder] for entry in group]
        shares = {"K": mean_ratios(scores, places, [0]), "retained": mean_ratios(still, places, [0])} if outcomes else {}
        found[method] = shares | ({"kept": _mean(gains, places)} if gains else {})
    return found


def _of_task(
    outcomes: list[Outcomes], scores: list[Array], draw: Draw, methods: Methods, place: dict[Path, int], by_likelihood: bool
) -> dict[str, dict[str, Array]]:
    """T, and how much likelier right answers became."""
    gains = _gains(outcomes, draw)
    marks = scores if not by_likelihood else gains if len(gains) == len(scores) else []  # every benchmark or none
    found = {}
    for method, group in methods.items():
        places, fulls = [place[entry.folder] for entry in group], [place[entry.full] for entry in group if entry.full in place]
        share = {"T": mean_ratios(marks, places, fulls)} if marks and len(fulls) == len(group) else {}
        found[method] = share | ({"learned": _mean(gains, places)} if gains else {})
    return found


def _gains(outcomes: list[Outcomes], draw: Draw) -> list[Array]:
    return draw([gains for each in outcomes if (gains := each.gains).size])


def _mean(drawn: list[Array], places: list[int]) -> Array:
    found: Array = np.mean([each[:, places] for each in drawn], axis=0)
    return found


def stream_of(seed: int, kind: Kind) -> list[int]:
    """Seeds the draws of the questions of a kind: not those of another, or a hundred facts and a hundred messages would be drawn alike, and
    K and T would rise and fall together."""
    return [seed, KINDS.index(kind)]


def _outcomes(runs: list[Any], kind: Kind, only: Only | None) -> list[Outcomes]:
    """Each benchmark of a kind that every run was asked."""
    return [outcomes_of(name, kind, runs, only) for name in _names(runs, kind)]


def _names(runs: list[Any], kind: Kind) -> list[str]:
    return [name for name in getattr(runs[0][0], kind) if all(name in getattr(run[0], kind) for run in runs)]


def _chance(error: float, degrees: int, resamples: int, *names: str) -> Array:
    """`[resamples]`: by how much a value with this standard error, of so many degrees of freedom, may be off; nothing is known of a single
    seed, which has none.

    Args:
        names: of what it is the value. The order of the draws depends on them, and not on what else stands in the table.
    """
    off: Array = _generator(*names).permutation(t_quantiles(degrees, resamples)) * error if degrees else np.zeros(resamples)
    return off


def _generator(*names: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(" ".join(names).encode()))


def _estimate(drawn: Array, value: float, draws: Array, low: float, high: float, *names: str) -> Estimate:
    """A mean over the seeds with its interval.

    Args:
        drawn: `[1 + resamples, seeds]`: the value of each seed, and its resamples.
        value, draws: the mean, and its resamples.
        low, high: it cannot lie beyond.
    """
    of_seed = drawn[0]
    error = float(of_seed.std(ddof=1)) / math.sqrt(len(of_seed)) if len(of_seed) > 1 else 0.0
    off = _chance(error, len(of_seed) - 1, len(draws), *names)
    return Estimate(value, *interval((draws + off).clip(low, high)))


def _standing(method: str, metrics: dict[str, Array], seeds: Sequence[int], scored: Mapping[str, Array] = MappingProxyType({})) -> Standing:
    """The means over the seeds.

    Args:
        metrics, scored: `[1 + resamples, seeds]` of each metric, and of each benchmark's score: the value of each seed, and its resamples.
    """
    known = {metric: each for metric, each in metrics.items() if np.isfinite(each[0]).all()}
    values = {metric: float(each[0].mean()) for metric, each in known.items()}
    draws = {metric: each[1:].mean(axis=1) for metric, each in known.items()}
    if {"K", "T"} <= set(known):
        values["KT"], draws["KT"] = balance(values["K"], values["T"]), balances(draws["K"], draws["T"])
        known["KT"] = balances(known["K"], known["T"])
    ends = {"retained": (0.0, 1.0), **dict.fromkeys(NATS, (-math.inf, math.inf))}
    estimates = {
        metric: _estimate(known[metric], values[metric], drawn, *ends.get(metric, (0.0, math.inf)), metric, method)
        for metric, drawn in draws.items()
    }
    of_seed = {metric: dict(zip(seeds, each[0].tolist(), strict=True)) for metric, each in known.items()}
    benchmarks = {
        name: _estimate(
            each, float(each[0].mean()), each[1:].mean(axis=1), min(0.0, float(each.min())), max(1.0, float(each.max())), name, method
        )
        for name, each in scored.items()
    }
    return Standing(estimates, draws, of_seed, benchmarks)


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
    rivals = {method: standing for method, standing in found.items() if not is_reference(method)}
    for metric in METRICS:
        known = [method for method, standing in rivals.items() if metric in standing.estimates]
        values = {method: rivals[method].estimates[metric].value for method in known}
        draws = {method: rivals[method].draws[metric] for method in known}
        errors, degrees = _errors({method: rivals[method].of_seed[metric] for method in known})
        gaps = {pair: _gap(*pair, draws, errors, degrees, metric) for pair in combinations(known, 2)}
        for_best, for_reference = _p_values(values, draws, errors, degrees, metric, reference)
        for method in known:
            others = [name for name in known if name != method]
            best = max(others, key=values.__getitem__, default=method)
            for against in dict.fromkeys([*([reference] if reference in others else []), *([best] if others else [])]):
                pair = (method, against) if (method, against) in gaps else (against, method)
                gap = gaps[pair] if pair[0] == method else 0.0 - gaps[pair]  # not -0.0, where nothing differs
                p = (for_best if against == best else for_reference)[pair]
                estimate = Estimate(values[method] - values[against], *interval(gap))
                rows.append({"method": method, "against": against, "metric": metric, **asdict(estimate), "p_value": p})
    return sorted(rows, key=lambda row: [*rivals].index(row["method"]))


def _errors(of_seed: dict[str, dict[int, float]]) -> tuple[dict[str, float], int]:
    """The standard error of every method's mean over the seeds, from how far the runs of all methods scatter, and its degrees of freedom.

    Args:
        of_seed: the value of each seed, of every method. Where all have the same seeds, what a seed does to all of them is left out.
    """
    groups = [np.array([group[seed] for seed in sorted(group)]) for group in of_seed.values()]
    rest = [group - group.mean() for group in groups]
    degrees = sum(len(group) - 1 for group in groups)
    if len({frozenset(group) for group in of_seed.values()}) == 1:
        rest = [each - np.mean(rest, axis=0) for each in rest]
        degrees -= len(groups[0]) - 1
    scatter = math.sqrt(sum(float((each**2).sum()) for each in rest) / degrees) if degrees else 0.0
    return {method: scatter / math.sqrt(len(group)) for method, group in of_seed.items()}, degrees


def _gap(one: str, other: str, draws: dict[str, Array], errors: dict[str, float], degrees: int, metric: str) -> Array:
    """Resamples of the difference of two methods: of the questions, and of the seeds."""
    error = math.hypot(errors[one], errors[other])
    gap: Array = draws[one] - draws[other] + _chance(error, degrees, len(draws[one]), metric, one, other)
    return gap


def _p_values(
    values: dict[str, float], draws: dict[str, Array], errors: dict[str, float], degrees: int, metric: str, reference: str
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """The p-values of every pair, for all pairs at once, and of those with the reference, for these at once.

    Args:
        errors: the standard error of each mean over the seeds, estimated from all methods together with so many degrees of freedom.
    """
    pairs = [*combinations(values, 2)]
    resamples = len(next(iter(draws.values()), ()))
    scale = np.sqrt(degrees / _generator(metric).chisquare(degrees, resamples)) if degrees else np.zeros(resamples)
    off = {method: draws[method] + scale * errors[method] * _generator(metric, method).standard_normal(resamples) for method in values}

    def at_once(some: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
        if not some:
            return {}
        gaps = np.stack([off[one] - off[other] for one, other in some], axis=1)
        observed = np.array([values[one] - values[other] for one, other in some])
        return dict(zip(some, simultaneous_p_values(gaps, observed).tolist(), strict=True))

    return at_once(pairs), at_once([pair for pair in pairs if reference in pair])
