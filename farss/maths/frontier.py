"""What a method can give: knowledge against task over its learning rates, and what two such curves say of each other.

A method that forgets less because it learned less is not ahead. So K is compared where two methods learned equally much,
and T where they forgot equally much.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Point = tuple[float, float]
"""(T, K) of one run."""


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both T and K, from the smallest T to the largest."""
    best: list[Point] = []
    for t, k in sorted(points, reverse=True):
        if not best or k > best[-1][1]:
            best.append((t, k))
    return best[::-1]


def kept_at(points: Sequence[Point], t: float) -> float | None:
    """K where T is `t`, by straight lines between the points of the frontier.

    A smaller T than the smallest is reached by stopping there: its K is that of the smallest. A larger one than the largest
    is not reached: None.
    """
    line = frontier(points)
    if not line or t > line[-1][0]:
        return None
    learned, kept = zip(*line, strict=True)
    return float(np.interp(t, learned, kept))


def learned_at(points: Sequence[Point], k: float) -> float | None:
    """T where K is `k`: the same with the axes changed."""
    return kept_at([(kept, learned) for learned, kept in points], k)


def area(points: Sequence[Point], low: float, high: float) -> float | None:
    """Mean K over T from `low` to `high` (exact for the straight lines of `kept_at`).

    Returns:
        None where the curve does not reach `high`, or the range is empty.
    """
    if high <= low or kept_at(points, high) is None:
        return None
    corners = sorted({low, high, *(t for t, _ in frontier(points) if low < t < high)})
    heights = [kept_at(points, t) or 0.0 for t in corners]
    total = sum((k0 + k1) / 2 * (t1 - t0) for (t0, k0), (t1, k1) in pairwise(zip(corners, heights, strict=True)))
    return total / (high - low)
