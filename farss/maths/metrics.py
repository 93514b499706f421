"""What was kept, what was learned, and how sure we are (FARSS, appendix A.3)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from farss.errors import FarssError

Array = NDArray[np.float64]

CHUNK = 4_000_000
"""Questions drawn at once: bounds the memory of the bootstrap to a few times 32 MB."""


def ratios(tops: ArrayLike, bottoms: ArrayLike) -> Array:
    """`tops / bottoms`; 0 where something was lost and not gained, NaN where the reference is not above 0."""
    above, below = np.asarray(tops, dtype=np.float64), np.asarray(bottoms, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares: Array = np.where(below > 0, np.maximum(above, 0.0) / below, np.nan)
    return shares


def mean_ratios(means: Sequence[Array], top: int | list[int], bottom: int | list[int]) -> Array:
    """K (eq. 36) or T (eq. 37), sample by sample: the mean over benchmarks of a model's score / a reference's, which is the base model for
    K and full fine-tuning for T. For scores may stand what was gained, in nats. NaN where a reference is not above 0.

    Args:
        means: for each benchmark `[samples, models]`.
        top, bottom: columns of the models and of their references: one, or as many as there are models.

    Returns:
        `[samples]`, or `[samples, models]`.
    """
    shares: Array = np.mean([ratios(each[:, top], each[:, bottom]) for each in means], axis=0)
    return shares


def balance(k: float, t: float) -> float:
    """KT (eq. 38): the harmonic mean of K and T; 0 when both are 0."""
    return 2 * k * t / (k + t) if k + t > 0 else 0.0


def balances(k: Array, t: Array) -> Array:
    """KT of every resample, `[resamples]`; NaN where K or T has no value."""
    total = k + t
    with np.errstate(divide="ignore", invalid="ignore"):
        means: Array = np.where(total == 0, 0.0, 2 * k * t / total)
    return means


# --- uncertainty -----------------------------------------------------------------------------------------------------


def bootstrap(outcomes: Sequence[ArrayLike], resamples: int, seed: int | Sequence[int]) -> list[Array]:
    """Mean scores on resampled questions; every model sees the same resample, so ratios and differences are paired.

    Args:
        outcomes: for each benchmark `[models, questions]`: the score of each model on each question.
        resamples: how often the questions of each benchmark are drawn anew, with replacement.
        seed: seed of the draws.

    Returns:
        For each benchmark `[resamples, models]`.
    """
    generator = np.random.default_rng(seed)
    return [_resampled_means(np.atleast_2d(np.asarray(each, dtype=np.float64)), resamples, generator) for each in outcomes]


def observed_and_resampled(outcomes: Sequence[Array], resamples: int, seed: int | Sequence[int]) -> list[Array]:
    """For each benchmark `[1 + resamples, models]`: the mean over its questions, and those of `bootstrap`."""
    drawn = bootstrap(outcomes, resamples, seed)
    return [np.vstack([each.mean(axis=1), draws]) for each, draws in zip(outcomes, drawn, strict=True)]


def _resampled_means(outcomes: Array, resamples: int, generator: np.random.Generator) -> Array:
    questions = outcomes.shape[1]
    step = max(1, CHUNK // questions)
    parts = []
    for start in range(0, resamples, step):
        drawn = generator.integers(questions, size=(min(step, resamples - start), questions))
        places = drawn + questions * np.arange(len(drawn))[:, None]
        often = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)  # no outcome is gathered
        sums = [np.einsum("rq,q->r", often, own) for own in outcomes]  # one by one: rounded alike, whoever is beside it
        parts.append(np.stack(sums, axis=1) / questions)
    return np.concatenate(parts)


def interval(draws: ArrayLike) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws. Draws without a value (a zero denominator: NaN) are left out.

    Raises:
        FarssError: no draw has a value.
    """
    values = np.asarray(draws, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        raise FarssError("no bootstrap resample has a value: ask more questions")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@functools.cache
def t_quantiles(degrees: int, count: int) -> Array:
    """Student's t in the middles of `count` equal parts of its distribution, `[count]`, ascending. Of draws at random the few in the tails,
    which make an interval, are off by a tenth and more.

    With t = sqrt(degrees) tan(a), the density of a is proportional to cos(a)^(degrees - 1).
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 100_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    middles = (np.arange(count) + 0.5) / count
    quantiles: Array = np.sqrt(degrees) * np.tan(np.interp(middles, below / below[-1], angles))
    return quantiles


def paired_difference(a: ArrayLike, b: ArrayLike, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean difference `a - b` of two models' outcomes on the same questions, `[questions]` each, and its 95 % interval.

    Raises:
        ValueError: the two have different lengths, or there is no question.
    """
    gap = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64) if np.shape(a) == np.shape(b) else None
    if gap is None or not gap.size:
        raise ValueError(f"outcomes of the same questions are needed, got {np.shape(a)} and {np.shape(b)}")
    draws = bootstrap([gap], resamples, seed)[0][:, 0]
    return float(gap.mean()), *interval(draws)


def simultaneous_p_values(gaps: Array, values: Array) -> Array:
    """Two-sided bootstrap p-values of no difference, for several differences at once (single step, as Westfall and Young 1993): how often
    the largest of them all, each relative to the 95 % quantile of its own error, is off by as much. Where nothing differs, the smallest
    p-value is below 0.05 in 5 % of all cases, however many there are and whichever of them is looked at.

    Args:
        gaps: `[resamples, differences]`.
        values: `[differences]`, as observed.

    Returns:
        `[differences]`
    """
    off = np.abs(gaps - values)
    off = off[np.isfinite(off).any(axis=1)]
    off = np.where(np.isfinite(off), off, np.nan)  # draws without a value
    scale = np.nanquantile(off, 0.95, axis=0)
    certain = scale == 0  # the same in every draw
    scale = np.where(certain, 1.0, scale)
    largest = np.nanmax(np.where(certain, 0.0, off / scale), axis=1, keepdims=True)
    observed = np.where(certain & (values != 0), np.inf, np.abs(values) / scale)
    shares: Array = ((largest >= observed).sum(axis=0) + 1) / (len(off) + 1)  # the observed sample is itself one that might be drawn
    return np.minimum(1.0, shares)
