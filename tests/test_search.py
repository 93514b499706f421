"""The search for the boundary on made-up score functions: within its budget, deterministic, and right where nothing is noise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farss.errors import ConfigError, FarssError
from farss.maths.metrics import balance
from farss.search import ProbeOutcomes, candidates, fit, halved, score, search, shallow_end

QUESTIONS = 40
BASE = ProbeOutcomes([np.full(QUESTIONS, 0.8)], np.full(QUESTIONS, -3.0))


class Curves:
    """A made-up probe: `kept[boundary]` and `gain[boundary]` (nats) at the end of the training, less of both before."""

    def __init__(self, kept, gain, noise=0.0):
        self.kept, self.gain, self.noise, self.calls = kept, gain, noise, []

    def __call__(self, boundary, steps):
        self.calls.append((boundary, steps))
        generator = np.random.default_rng([boundary, steps])
        share = steps / (steps + 10)
        draw = generator.normal(size=(2, QUESTIONS)) * self.noise
        knowledge = 0.8 * (1 - share * (1 - self.kept[boundary])) + draw[0]
        return ProbeOutcomes([knowledge], -3.0 + share * self.gain[boundary] + draw[1], 1000 + boundary)


def schedule(count=5, steps_full=1000, scoring=1.0):
    return fit(list(range(2, 2 + count)), steps_full, 0.05, 0.3, scoring)


def run(curves, plan=None, seed=0):
    return search(plan or schedule(len(curves.kept)), BASE, curves, 200, seed)


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "first", "last"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (4, 1, 2), (12, 1, 4), (18, 2, 6), (28, 3, 8), (32, 4, 9), (40, 5, 11)]
)
def test_candidates_from_the_eighth_to_the_quarter_and_one(blocks, first, last):
    assert candidates(blocks) == list(range(first, last + 1))


@given(st.integers(2, 200))
def test_some_block_stays_deep_and_no_candidate_is_beyond_what_the_survey_decomposes_exactly(blocks):
    assert 1 <= candidates(blocks)[0] <= candidates(blocks)[-1] < blocks
    assert candidates(blocks)[-1] <= shallow_end(blocks)


# --- the schedule ----------------------------------------------------------------------------------------------------


@given(
    count=st.integers(2, 30),
    steps_full=st.integers(40, 20_000),
    probe=st.floats(0.01, 0.2),
    budget=st.floats(0.05, 0.5),
    scoring=st.floats(0, 30),
)
def test_the_budget_is_never_exceeded(count, steps_full, probe, budget, scoring):
    wanted = list(range(1, count + 1))
    try:
        plan = fit(wanted, steps_full, probe, budget, scoring)
    except ConfigError as error:
        assert f"{steps_full} training steps are too few" in str(error)  # noqa: PT017
        return
    assert plan.cost_share <= budget + 1e-9
    assert set(plan.candidates) <= set(wanted)
    assert {wanted[0], wanted[-1]} <= set(plan.candidates)
    assert plan.rounds[0].size == len(plan.candidates) >= 2
    assert all(1 <= later.size <= one.size for one, later in zip(plan.rounds, plan.rounds[1:], strict=False))
    assert all(later.steps == 2 * one.steps for one, later in zip(plan.rounds, plan.rounds[1:], strict=False))
    longest = max(2, int(probe * steps_full))
    assert max(2, longest / 2) <= plan.rounds[0].steps <= longest


@given(st.integers(2, 40), st.integers(100, 5000), st.floats(0, 5))
def test_what_a_search_spends_is_what_its_schedule_says(count, steps_full, scoring):
    try:
        plan = fit(list(range(count)), steps_full, 0.05, 0.3, scoring)
    except ConfigError:
        return
    curves = Curves([0.9] * count, [1 + 0.01 * place for place in range(count)])
    search(plan, BASE, curves, 20, 0)
    furthest = dict(curves.calls)  # the last probe of each
    assert sum(furthest.values()) == plan.training
    spent = plan.training + scoring * (len(curves.calls) + 1)
    assert spent == pytest.approx(plan.cost_share * steps_full)


def test_rounds_of_the_usual_models():
    assert halved(5) == [5, 3, 2]
    assert [tuple(each) for each in schedule(4).rounds] == [(4, 48), (2, 96)]
    assert [tuple(each) for each in schedule(5).rounds] == [(5, 36), (3, 72)]
    assert [tuple(each) for each in schedule(6).rounds] == [(6, 32), (3, 64)]
    assert schedule(12).candidates == [2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]  # twelve of them would have too short probes
    assert schedule(1).rounds == []
    assert schedule(1).cost_share == 0


# --- the choice ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.3, 1.0), st.floats(0.2, 2.0)), min_size=2, max_size=9))
def test_of_noiseless_candidates_the_best_is_always_chosen(pairs):
    """Also where the quickest learner is dropped on the way: the others are still measured against it."""
    best = max(gain for _, gain in pairs)
    expected = [2 * k * (gain / best) / (k + gain / best) for k, gain in pairs]

    def probe(boundary, steps):
        k, gain = pairs[boundary]
        return ProbeOutcomes([np.full(QUESTIONS, 0.8 * k)], np.full(QUESTIONS, -3.0 + gain))

    plan = fit(list(range(len(pairs))), 1000, 0.05, 0.9, 0.0)
    found = search(plan, BASE, probe, 20, 0)
    assert expected[found.chosen] == pytest.approx(max(expected), abs=1e-9)
    assert [each.KT for each in found.candidates] == pytest.approx(expected, abs=1e-9)


def test_ties_go_to_the_smaller_boundary():
    equal = dict.fromkeys(range(2, 7), 0.9)
    found = run(Curves(equal, equal))
    assert found.chosen == 2
    assert found.margin == 0
    assert [each.boundary for each in found.candidates if not each.dropped] == [2, 3, 4]
    later = run(Curves({**equal, 2: 0.5}, equal))  # every other one is equal
    assert later.chosen == 3


def test_a_dominated_candidate_is_dropped_and_not_probed_again():
    kept, gain = {2: 0.9, 3: 0.6, 4: 0.95, 5: 0.92}, {2: 1.0, 3: 0.5, 4: 1.0, 5: 1.0}
    curves = Curves(kept, gain)
    found = run(curves)
    first, second = (each.steps for each in schedule(4).rounds)
    assert curves.calls == [(2, first), (3, first), (4, first), (5, first), (4, second), (5, second)]
    assert found.chosen == 4
    assert {each.boundary: (each.steps, each.dropped) for each in found.candidates} == {
        2: (first, True), 3: (first, True), 4: (second, False), 5: (second, False),
    }  # fmt: skip
    assert [[each.boundary for each in one] for one in found.rounds] == [[2, 3, 4, 5], [4, 5]]


def test_the_same_seed_gives_the_same_search_and_intervals_hold_their_values():
    kept, gain = {2: 0.9, 3: 0.8, 4: 0.95, 5: 0.92}, {2: 1.0, 3: 1.1, 4: 0.9, 5: 1.0}
    one, two = (run(Curves(kept, gain, noise=0.05), seed=7) for _ in range(2))
    assert one == two
    assert run(Curves(kept, gain, noise=0.05), seed=8).chosen == one.chosen  # the seed only draws the intervals
    for each in one.candidates:
        assert each.low <= each.KT <= each.high
        assert balance(each.K, each.T) == each.KT
    assert one.margin_low <= one.margin <= one.margin_high
    assert {each.boundary: each.parameters for each in one.candidates} == {2: 1002, 3: 1003, 4: 1004, 5: 1005}


def test_K_is_the_mean_of_the_ratios_of_the_sets_and_T_the_share_of_the_largest_fall():
    base = ProbeOutcomes([np.array([0.5, 0.7]), np.array([0.2])], np.array([-4.0, -2.0]))
    one = ProbeOutcomes([np.array([0.3, 0.6]), np.array([0.1])], np.array([-2.0, -1.0]))
    two = ProbeOutcomes([np.array([0.6, 0.6]), np.array([0.2])], np.array([-3.0, -1.5]))
    worse = ProbeOutcomes([np.array([0.6, 0.6]), np.array([0.2])], np.array([-5.0, -1.5]))
    (first, second, third), draws = score(base, {1: one, 2: two, 3: worse}, 9, 50, 0)
    kept, learned = [first.K, second.K], [first.T, second.T]
    assert kept == pytest.approx([(0.45 / 0.6 + 0.5) / 2, 1])
    assert learned == pytest.approx([1, 0.75 / 1.5])
    assert (third.T, third.KT) == (0, 0)  # a loss that rose is nothing learned, not less than nothing
    assert draws.shape == (3, 50)


def test_where_nothing_is_learned_there_is_nothing_to_choose():
    flat = dict.fromkeys(range(2, 6), 0.0)
    with pytest.raises(FarssError, match=r"after 48 steps no probe has a lower loss .* give plan.boundary a number"):
        run(Curves(dict.fromkeys(flat, 0.9), flat))
