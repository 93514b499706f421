"""The search for the boundary as arithmetic: candidates, rounds that fit into a budget, and the choice. What a probe is, a
function from outside says, so everything here can be tested with made-up ones.

Successive halving (Jamieson & Talwalkar, 2016): every candidate gets a short probe, the better half goes on to twice the
steps, and so on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from farss.errors import ConfigError, FarssError
from farss.maths.metrics import Array, balances, interval, mean_ratios, observed_and_resampled, ratios

BASE = 0
"""The column of the base model; the candidates follow."""


class ProbeOutcomes(NamedTuple):
    """What one model answered, question by question; the same questions for every model."""

    knowledge: list[Array]
    """For each set of questions `[questions]`: the probability (0 .. 1) of an answer's token, averaged geometrically."""
    task: Array
    """`[examples]`: mean log-likelihood (nats) of the answer's tokens."""
    parameters: int = 0
    """Trainable parameters."""


Probe = Callable[[int, int], ProbeOutcomes]
"""Called with (boundary, steps): the outcomes of this boundary after so many optimiser steps, counted from the start."""


# --- what is probed --------------------------------------------------------------------------------------------------


def shallow_end(blocks: int) -> int:
    """The largest boundary of the search (section 3.1: a quarter; the published choices need one more)."""
    return math.ceil(blocks / 4) + 1


def candidates(blocks: int) -> list[int]:
    """The boundaries that are compared: from an eighth of the blocks on; at least one block stays deep."""
    last = max(1, min(shallow_end(blocks), blocks - 1))
    return list(range(max(1, blocks // 8), last + 1))


class Round(NamedTuple):
    """One round of the search."""

    size: int
    """Candidates in it."""
    steps: int
    """Optimiser steps of each of them at its end, counted from their start."""


@dataclass(frozen=True)
class Schedule:
    """What a search will do, known before its first step."""

    candidates: list[int]
    rounds: list[Round]
    """Empty where there is nothing to choose from."""
    steps_full: int
    """Optimiser steps of the training that is being prepared."""
    scoring: float
    """What it costs to score one model, in optimiser steps."""

    @property
    def training(self) -> int:
        """Optimiser steps of all probes."""
        before = [0, *(each.steps for each in self.rounds)]
        return sum(each.size * (each.steps - start) for each, start in zip(self.rounds, before, strict=False))

    @property
    def cost_share(self) -> float:
        """Training and scoring, the base model's scoring too, as a share of the training that is being prepared."""
        scorings = sum(each.size for each in self.rounds) + 1 if self.rounds else 0
        return (self.training + scorings * self.scoring) / self.steps_full


def halved(count: int) -> list[int]:
    """How many candidates each round has: the better half goes on, down to the last two. `5 -> 5, 3, 2`."""
    counts = [count]
    while counts[-1] > 2:
        counts.append(math.ceil(counts[-1] / 2))
    return counts


SHORTEST = 2
"""Steps of a first probe: with one its learning rate does not fall."""


def fit(wanted: list[int], steps_full: int, probe: float, budget: float, scoring: float) -> Schedule:
    """The schedule with the most candidates, and then the most rounds, whose first probe keeps half its length or more.

    Args:
        wanted: the candidates, ascending.
        steps_full: optimiser steps of the training that is being prepared.
        probe: length of a first probe as a share of them.
        budget: what all of it may cost, as a share of them.
        scoring: what it costs to score one model, in optimiser steps.

    Raises:
        ConfigError: not even two candidates fit.
    """
    if len(wanted) == 1:
        return Schedule(wanted, [], steps_full, scoring)
    longest = max(SHORTEST, int(probe * steps_full))
    for kept in _thinned(wanted):
        counts = halved(len(kept))
        for rounds in range(len(counts), 0, -1):
            steps = min(longest, _first_probe(counts[:rounds], budget * steps_full, scoring))
            if steps >= SHORTEST and 2 * steps >= longest:
                return Schedule(kept, [Round(n, steps * 2**place) for place, n in enumerate(counts[:rounds])], steps_full, scoring)
    raise ConfigError(
        f"plan.boundary=auto: {budget:.0%} of {steps_full} training steps are too few for probes of {longest} steps and their "
        f"scoring: give plan.boundary a number ({wanted[0]} to {wanted[-1]}), train for more steps, or raise boundary.budget"
    )


def _thinned(wanted: list[int]) -> Iterator[list[int]]:
    """All candidates, then one fewer at a time, evenly spaced between the first and the last."""
    for count in range(len(wanted), 1, -1):
        yield [wanted[round(place * (len(wanted) - 1) / (count - 1))] for place in range(count)]


def _first_probe(counts: list[int], budget: float, scoring: float) -> int:
    """The longest first probe that a budget (in steps) allows, if every later round doubles the steps."""
    shares = counts[0] + sum(count * 2**place for place, count in enumerate(counts[1:]))
    return max(0, int((budget - scoring * (sum(counts) + 1)) // shares))


# --- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One boundary after one round."""

    boundary: int
    steps: int
    """Optimiser steps of its probe."""
    T: float
    """How far it brought the task's loss down, relative to the candidate that brought it down most."""
    K: float
    """Knowledge kept: after / before."""
    KT: float
    """Their harmonic mean, and its 95 % interval."""
    low: float
    high: float
    parameters: int
    dropped: bool
    """Whether others went on, and it did not."""


class Found(NamedTuple):
    """The choice and everything that led to it."""

    chosen: int
    candidates: list[Candidate]
    """Each as far as it was probed, in the order of their boundaries."""
    margin: float
    """How much the chosen one's KT exceeds that of the next best in the last round, and the paired 95 % interval."""
    margin_low: float
    margin_high: float
    rounds: list[list[Candidate]]


def search(
    schedule: Schedule, base: ProbeOutcomes, probe: Probe, resamples: int, seed: int, on_round: Callable[[list[int]], None] | None = None
) -> Found:
    """Probe round by round, and choose the largest KT of the last round; of equal ones the smaller boundary.

    Args:
        base: the outcomes of the untouched model.
        resamples, seed: of the bootstrap over questions.
        on_round: called after each round with the candidates that go on.

    Raises:
        FarssError: no probe of a round has learned anything.
    """
    left, rounds, margin, reach = schedule.candidates, [], (0.0, 0.0, 0.0), 1.0
    for place, (_, steps) in enumerate(schedule.rounds):
        last = place == len(schedule.rounds) - 1
        outcomes = {boundary: probe(boundary, steps) for boundary in left}
        scored, draws = score(base, outcomes, steps, resamples, seed, reach)
        order = sorted(scored, key=lambda each: (-round(each.KT, 12), each.boundary))
        if last:
            margin = _margin(order, scored, draws)
        left = sorted(each.boundary for each in order[: 1 if last else schedule.rounds[place + 1].size])
        # The quickest learner may be dropped for what it forgot. The others are still measured against it.
        reach = max(each.T for each in scored if each.boundary in left)
        rounds.append([replace(each, dropped=not last and each.boundary not in left) for each in scored])
        if on_round:
            on_round(left)
    furthest = {each.boundary: each for each in itertools.chain.from_iterable(rounds)}
    return Found(left[0], [furthest[boundary] for boundary in sorted(furthest)], *margin, rounds)


def score(
    base: ProbeOutcomes, outcomes: dict[int, ProbeOutcomes], steps: int, resamples: int, seed: int, reach: float = 1.0
) -> tuple[list[Candidate], Array]:
    """K, T and KT of the candidates of one round, with paired bootstrap intervals.

    Args:
        reach: T of the best learner among them.

    Returns:
        the candidates, in the order given, and the draws of their KT, `[candidates, resamples]`.

    Raises:
        FarssError: no candidate's loss is below the base model's, so T has no reference.
    """
    models = [base, *outcomes.values()]
    knowledge = [np.stack(answers) for answers in zip(*(each.knowledge for each in models), strict=True)]  # [models, questions]
    task = np.stack([each.task for each in models])
    best = 1 + int(np.argmax(task[1:].mean(axis=1)))
    if task[best].mean() <= task[BASE].mean():
        raise FarssError(
            f"plan.boundary=auto: after {steps} steps no probe has a lower loss on held-out examples than the base model: "
            "give plan.boundary a number, raise boundary.probe, or lower boundary.rate if the loss has risen"
        )
    *known, learned = observed_and_resampled([*knowledge, task], resamples, seed)
    found, draws = [], []
    for place, (boundary, own) in enumerate(outcomes.items(), 1):
        k, t = mean_ratios(known, place, BASE), reach * _learned(learned, place, best)  # [1 + resamples]
        kt = balances(k, t)
        draws.append(kt[1:])
        found.append(Candidate(boundary, steps, float(t[0]), float(k[0]), float(kt[0]), *interval(kt[1:]), own.parameters, False))
    return found, np.stack(draws)


def _learned(means: Array, place: int, best: int) -> Array:
    """The fall of the loss, relative to the best candidate's, sample by sample `[samples]`; 0 where it rose."""
    gains = means - means[:, [BASE]]  # [samples, models]
    return ratios(gains[:, place], gains[:, best])


def _margin(order: Sequence[Candidate], scored: Sequence[Candidate], draws: Array) -> tuple[float, float, float]:
    first, second = (draws[scored.index(each)] for each in order[:2])
    return (order[0].KT - order[1].KT, *interval(first - second))
