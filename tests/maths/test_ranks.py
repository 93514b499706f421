"""Laws of the inverse rank allocation."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farss.artifacts import Layer
from farss.maths.ranks import BUDGETS, exact_ranks, matched_rank, paper_ranks
from farss.methods.uniform import uniform_parameters

importances = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40)
both = pytest.mark.parametrize("budget", sorted(BUDGETS))


@both
@given(values=importances, r_min=st.integers(1, 8), r_max=st.integers(8, 64), data=st.data())
def test_inside_the_bounds_and_monotone(budget, values, r_min, r_max, data):
    r_avg = data.draw(st.integers(r_min, r_max))
    ranks = BUDGETS[budget](values, r_avg, r_min, [r_max] * len(values))
    assert all(r_min <= rank <= r_max for rank in ranks)
    pairs = sorted(zip(values, ranks, strict=True))
    for (low, more), (high, less) in itertools.pairwise(pairs):
        assert low == high or more >= less


@given(values=importances, r_min=st.integers(1, 8), r_max=st.integers(8, 64), data=st.data())
def test_exact_hands_out_the_whole_budget(values, r_min, r_max, data):
    r_avg = data.draw(st.integers(r_min, r_max))
    assert sum(exact_ranks(values, r_avg, r_min, [r_max] * len(values))) == r_avg * len(values)


@given(values=importances, data=st.data())
def test_exact_respects_different_caps(values, data):
    caps = [data.draw(st.integers(1, 64)) for _ in values]
    ranks = exact_ranks(values, 50, 1, caps)
    assert all(1 <= rank <= cap for rank, cap in zip(ranks, caps, strict=True))
    assert sum(ranks) == min(50 * len(values), sum(caps))


@both
@given(values=importances, scale=st.sampled_from([1e-14, 1e-3, 2.0, 1e6]))
def test_unchanged_when_the_loss_is_multiplied(budget, values, scale):
    # A power of two is exact; for the others a value that sits on a rounding edge may fall on either side.
    caps = [64] * len(values)
    one, two = BUDGETS[budget](values, 20, 1, caps), BUDGETS[budget]([value * scale for value in values], 20, 1, caps)
    assert all(abs(a - b) <= (scale != 2.0) for a, b in zip(one, two, strict=True))


def test_inverse_proportion_of_the_paper():
    # omega = 1/I: 1, 1/2, 1/4 of a budget of 3 * 7 = 21 are 12, 6 and 3.
    assert paper_ranks([1.0, 2.0, 4.0], 7, 1, [64] * 3) == [12, 6, 3]


def test_clipping_loses_budget_on_paper_and_not_in_exact():
    values, caps = [1.0, 1000.0, 1000.0, 1000.0], [64] * 4
    assert paper_ranks(values, 50, 1, caps) == [64, 1, 1, 1]
    assert exact_ranks(values, 50, 1, caps) == [64, 46, 45, 45]


def test_tiny_importances_keep_their_order():
    assert paper_ranks([1e-14, 2e-14, 4e-14], 7, 1, [64] * 3) == [12, 6, 3]


def test_the_proportion_holds_over_many_decades():
    """What guards against zero is no part of it."""
    assert paper_ranks([1e-4, 1.0], 5001, 1, [10**6] * 2) == [10001, 1]


def test_no_rank_exceeds_what_a_layer_has_even_where_the_smallest_does():
    for ranks in (paper_ranks, exact_ranks):
        assert ranks([1.0, 2.0], 50, 50, [50, 16]) == [50, 16]


def test_zero_importance_is_an_error_not_a_guess():
    with pytest.raises(ValueError, match="not all zero"):
        paper_ranks([0.0, 0.0], 4, 1, [8, 8])
    with pytest.raises(ValueError, match="not all zero"):
        exact_ranks([math.inf, 1.0], 4, 1, [8, 8])


@given(per_rank=st.integers(1, 1000), fixed=st.integers(0, 10_000), largest=st.integers(1, 300), target=st.integers(1, 200_000))
def test_matched_rank_is_the_nearest(per_rank, fixed, largest, target):
    chosen = matched_rank(lambda rank: fixed + per_rank * rank, target, largest)
    best = min(abs(fixed + per_rank * rank - target) for rank in range(1, largest + 1))
    assert 1 <= chosen <= largest
    assert abs(fixed + per_rank * chosen - target) == best


def test_parameter_counts_of_the_paper():
    """LLaMA-2-7B, R=128 on all seven linear layers of 32 blocks: 320M; LLaMA-3-8B: 336M; commonsense 56M and 57M; Gemma-2-9B, whose
    heads are wider than its states: 432M; RoBERTa on all six layers: 21M. FARSS with 7 and 5 shallow blocks: 271M and 285M, which is an
    average shallow rank of 38.4."""

    def count(blocks, hidden, mlp, kv, rank, names="qkvogud", heads=0):
        shapes = {
            "q": (heads or hidden, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "o": (hidden, heads or hidden),
            "g": (mlp, hidden),
            "u": (mlp, hidden),
            "d": (hidden, mlp),
        }
        layers = {f"{block}.{name}": Layer(name, block, shapes[name], 0.0) for block in range(blocks) for name in names}
        return uniform_parameters(layers, rank)

    assert round(count(32, 4096, 11008, 4096, 128) / 1e6) == 320
    assert round(count(32, 4096, 14336, 1024, 128) / 1e6) == 336
    assert round(count(40, 5120, 13824, 5120, 128) / 1e6) == 501
    assert round(count(32, 4096, 11008, 4096, 32, "qkvud") / 1e6) == 56
    assert round(count(32, 4096, 14336, 1024, 32, "qkvud") / 1e6) == 57
    assert round(count(42, 3584, 14336, 2048, 128, heads=4096) / 1e6) == 432
    assert round(count(12, 768, 3072, 768, 128, "qkvoud") / 1e6) == 21
    for shallow, published in ((7, 271), (5, 285)):
        deep = count(32 - shallow, 4096, 11008, 4096, 128)
        assert round((deep + 38.4 * count(shallow, 4096, 11008, 4096, 1)) / 1e6) == published
