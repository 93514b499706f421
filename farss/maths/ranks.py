"""Inverse rank allocation over the shallow layers (FARSS, eq. 9-12)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Number = TypeVar("Number", int, float)

EPSILON = 1e-12
"""Added to the normalised importance. Importances are about 1e-14 on real models, so an absolute epsilon would
make every layer equal; after dividing by their sum it only guards against zero."""


def inverse_weights(importances: Sequence[float]) -> list[float]:
    """omega (eq. 9) of importances normalised by their sum: unchanged when the loss is multiplied by a constant.

    Raises:
        ValueError: an importance is negative, or they are all zero.
    """
    total = math.fsum(importances)
    if min(importances) < 0 or not 0 < total < math.inf:
        raise ValueError(f"importances must be non-negative and not all zero, got a sum of {total}")
    return [1 / (value / total + EPSILON) for value in importances]


def paper_ranks(importances: Sequence[float], r_avg: float, r_min: int, caps: Sequence[int]) -> list[int]:
    """Eq. 10-12 literally: round, then clip to `[r_min, cap]`. What clipping cuts off is lost.

    Args:
        importances: one Fisher importance per layer.
        r_avg: average rank; the budget is `r_avg * len(importances)`.
        r_min: smallest rank.
        caps: largest rank of each layer, `min(r_max, m, n)`.
    """
    weights = inverse_weights(importances)
    share = r_avg * len(weights) / math.fsum(weights)
    return [_clip(math.floor(share * weight + 0.5), r_min, cap) for weight, cap in zip(weights, caps, strict=True)]


def exact_ranks(importances: Sequence[float], r_avg: float, r_min: int, caps: Sequence[int]) -> list[int]:
    """The same inverse proportion, but what clipping frees goes to the others: the ranks sum to
    `round(r_avg * len(importances))` whenever the bounds allow it. Arguments as in `paper_ranks`."""
    weights = inverse_weights(importances)
    lows = [min(r_min, cap) for cap in caps]
    budget = _clip(math.floor(r_avg * len(weights) + 0.5), sum(lows), sum(caps))
    share = _water_level(weights, lows, caps, budget)
    raw = [_clip(share * weight, low, cap) for weight, low, cap in zip(weights, lows, caps, strict=True)]
    ranks = [math.floor(value + 1e-9) for value in raw]
    # Largest remainders first; equal ones go to the less important, then to the earlier layer.
    order = sorted(range(len(raw)), key=lambda i: (ranks[i] - raw[i], -weights[i], i))
    room = [i for i in order if ranks[i] < caps[i]]
    for i in room[: budget - sum(ranks)]:
        ranks[i] += 1
    return ranks


def _water_level(weights: Sequence[float], lows: Sequence[int], caps: Sequence[int], budget: int) -> float:
    """The share at which the clipped proportional ranks sum to the budget (bisection: the sum only grows)."""

    def handed_out(share: float) -> float:
        return math.fsum(_clip(share * w, low, cap) for w, low, cap in zip(weights, lows, caps, strict=True))

    low, high = 0.0, max(cap / weight for cap, weight in zip(caps, weights, strict=True))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if handed_out(middle) < budget else (low, middle)
    return high


def _clip(value: Number, low: Number, high: Number) -> Number:
    return max(min(value, high), min(low, high))


BUDGETS: dict[str, Callable[[Sequence[float], float, int, Sequence[int]], list[int]]] = {
    "paper": paper_ranks,
    "exact": exact_ranks,
}


def matched_rank(parameters: Callable[[int], int], target: int, largest: int) -> int:
    """The rank in `1 .. largest` whose parameter count is nearest to `target`; `parameters` must not fall."""
    first = 1 + bisect.bisect_left(range(1, largest), target, key=parameters)  # with as many, or the largest
    return min((max(1, first - 1), first), key=lambda rank: (abs(parameters(rank) - target), rank))
