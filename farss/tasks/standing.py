"""How methods stand to each other: K, T and KT of each over its seeds, and whether a difference is more than chance.

Beside these ratios of scores stand `kept` and `learned`, in nats: how much likelier the right answers to knowledge and to task
questions became than they were before. They say something where a model solves too few questions for a ratio.

One bootstrap for all: every resample draws questions, the same for every model. Where a method has several seeds, the chance of the
seeds is added: Student's t times the standard error over them. (Two or three seeds drawn with replacement would spread far too little.)
Two methods with the same seeds are compared in pairs, since what a seed does to both, by its rows and their order, is no difference
between them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from farss.artifacts import KINDS, Kind
from farss.config import Config, method_of_label
from farss.maths.metrics import Array, balance, balances, interval, mean_ratios, observed_and_resampled, simultaneous_p_values, t_quantiles
from farss.tasks.outcomes import Estimate, Outcomes, outcomes_of, read_scores

NATS = ("kept", "learned")
METRICS = ("K", "T", "KT", "retained", *NATS)
Only = Callable[[str], bool]
"""Whether a question, by its id, counts."""
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


def standings(
    base: Path,
    methods: Methods,
    config: Config,
    only: Only | None = None,
    kinds: Sequence[Kind] = ("knowledge", "task"),
) -> dict[str, Standing]:
    """K, T and KT of every method from the per-question records of its runs.

    Args:
        base: folder of the untouched model's scores.
        methods: the runs of each method, one a seed.
        config: its `seed` and `evaluate` (resamples, and what T is made of).
        only: which questions count; None: all.
        kinds: of questions; K and `kept` come from knowledge, T and `learned` from the task.

    Raises:
        FolderError: scores are missing, or runs answered different questions.
    """
    everyone = [entry for group in methods.values() for entry in group]
    own = dict.fromkeys([base, *(entry.folder for entry in everyone)])
    with_full = own | dict.fromkeys(entry.full for entry in everyone if entry.full)
    read = {folder: read_scores(folder) for folder in with_full}
    found: dict[str, dict[str, Array]] = {method: {} for method in methods}
    for kind in kinds:
        # knowledge needs no full fine-tuning, which may have been asked the task alone
        folders = [*(own if kind == "knowledge" else with_full)]
        outcomes = _outcomes([read[folder] for folder in folders], kind, only)
        draw = partial(observed_and_resampled, resamples=config.evaluate.resamples, seed=stream_of(config.seed, kind))
        place = {folder: index for index, folder in enumerate(folders)}
        if kind == "knowledge":
            metrics = _of_knowledge(outcomes, draw, methods, place)
        else:
            metrics = _of_task(outcomes, draw, methods, place, config.evaluate.learned_by == "likelihood")
        for method in methods:
            found[method] |= metrics[method]
    return {method: _standing(method, metrics, [entry.seed for entry in methods[method]]) for method, metrics in found.items()}


def _of_knowledge(outcomes: list[Outcomes], draw: Draw, methods: Methods, place: dict[Path, int]) -> dict[str, dict[str, Array]]:
    """K, what is still right, and how much likelier right answers became, of every method `[1 + resamples, seeds]`."""
    scores, still = draw([each.scores for each in outcomes]), draw([each.still for each in outcomes])
    found, gains = {}, _gains(outcomes, draw)
    for method, group in methods.items():
        places = [place[entry.folder] for entry in group]
        shares = {"K": mean_ratios(scores, places, [0]), "retained": mean_ratios(still, places, [0])} if outcomes else {}
        found[method] = shares | ({"kept": _mean(gains, places)} if gains else {})
    return found


def _of_task(
    outcomes: list[Outcomes], draw: Draw, methods: Methods, place: dict[Path, int], by_likelihood: bool
) -> dict[str, dict[str, Array]]:
    """T, and how much likelier right answers became."""
    scores, gains = draw([each.scores for each in outcomes]), _gains(outcomes, draw)
    marks = scores if not by_likelihood else gains if len(gains) == len(scores) else []  # every benchmark or none
    found = {}
    for method, group in methods.items():
        places, fulls = [place[entry.folder] for entry in group], [place[entry.full] for entry in group if entry.full]
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
    names = [name for name in getattr(runs[0][0], kind) if all(name in getattr(run[0], kind) for run in runs)]
    return [outcomes_of(name, kind, runs, only) for name in names]


def _chance(values: Array, resamples: int, *names: str) -> Array:
    """`[resamples]`: by how much the mean over the seeds, `values`, may be off; nothing is known of a single seed.

    Args:
        names: of what they are the values. The order of the draws depends on them, and not on what else stands in the table.
    """
    count = len(values)
    if count == 1:
        return np.zeros(resamples)
    generator = np.random.default_rng(zlib.crc32(" ".join(names).encode()))
    off: Array = generator.permutation(t_quantiles(count - 1, resamples)) * values.std(ddof=1) / math.sqrt(count)
    return off


def _standing(method: str, metrics: dict[str, Array], seeds: Sequence[int]) -> Standing:
    """The means over the seeds.

    Args:
        metrics: for each metric `[1 + resamples, seeds]`: the value of each seed, and its resamples.
    """
    known = {metric: each for metric, each in metrics.items() if np.isfinite(each[0]).all()}
    values = {metric: float(each[0].mean()) for metric, each in known.items()}
    draws = {metric: each[1:].mean(axis=1) for metric, each in known.items()}
    if {"K", "T"} <= set(known):
        values["KT"], draws["KT"] = balance(values["K"], values["T"]), balances(draws["K"], draws["T"])
        known["KT"] = balances(known["K"], known["T"])
    estimates = {}
    for metric, drawn in draws.items():
        spread = drawn + _chance(known[metric][0], len(drawn), metric, method)
        ends = interval(spread if metric in NATS else spread.clip(0, 1 if metric == "retained" else None))
        estimates[metric] = Estimate(values[metric], *ends)
    of_seed = {metric: dict(zip(seeds, each[0].tolist(), strict=True)) for metric, each in known.items()}
    return Standing(estimates, draws, of_seed)


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
    rivals = {method: standing for method, standing in found.items() if method_of_label(method) != "full"}
    for metric in METRICS:
        known = [method for method, standing in rivals.items() if metric in standing.estimates]
        values = {method: rivals[method].estimates[metric].value for method in known}
        gaps = {pair: _gap(rivals, pair, metric) for pair in combinations(known, 2)}
        for_best = _p_values(gaps, values)
        for_reference = _p_values({pair: gap for pair, gap in gaps.items() if reference in pair}, values)
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


def _gap(found: Mapping[str, Standing], pair: tuple[str, str], metric: str) -> Array:
    """Resamples of the difference of two methods: of the questions, and of the seeds, in pairs where they are the same."""
    one, other = (found[method] for method in pair)
    gap = one.draws[metric] - other.draws[metric]
    first, second = one.of_seed[metric], other.of_seed[metric]
    if first.keys() == second.keys():
        return gap + _chance(np.array([first[seed] - second[seed] for seed in first]), len(gap), metric, *pair)
    for method, each in zip(pair, (first, second), strict=True):
        gap = gap + _chance(np.array([*each.values()]), len(gap), metric, method)
    return gap


def _p_values(gaps: dict[tuple[str, str], Array], values: dict[str, float]) -> dict[tuple[str, str], float]:
    """The p-value of every pair, for all of these at once."""
    if not gaps:
        return {}
    observed = np.array([values[one] - values[other] for one, other in gaps])
    return dict(zip(gaps, simultaneous_p_values(np.stack([*gaps.values()], axis=1), observed).tolist(), strict=True))
