"""K, T and KT: the paper's own tables from their raw scores, and the laws of the bootstrap."""

import json
from pathlib import Path

import numpy as np
import pytest

from farss.errors import FarssError
from farss.maths.metrics import (
    balance,
    balances,
    bootstrap,
    interval,
    mean_ratios,
    paired_difference,
    simultaneous_p_values,
    t_quantiles,
)

PAPER = json.loads((Path(__file__).parent / "paper_tables.json").read_text())
MISPRINTS = {tuple(line[:4]): line[4:] for line in PAPER["misprints"]}
ROWS = [(group, row) for group in PAPER["groups"] for row in group["rows"]]
HALF = 0.005  # half a unit in the last printed digit, of raw scores and of K, T and KT alike


def computed(group, row, shift=0.0):
    """K, T and KT of one row; `shift` moves scores up and references down, to bound what rounding can do."""
    k, t = (
        mean_ratios([np.array([[top + shift, bottom - shift]]) for top, bottom in zip(row[kind], group[below], strict=True)], 0, 1)
        for kind, below in (("knowledge", "base"), ("task", "full"))
    )
    return {"K": k[0], "T": t[0], "KT": balance(k[0], t[0])}


@pytest.mark.parametrize(("group", "row"), ROWS, ids=[f"{g['table']}-{g['model']}-{r['method']}" for g, r in ROWS])
def test_paper_tables_follow_from_their_raw_scores(group, row):
    exact, low, high = computed(group, row), computed(group, row, -HALF), computed(group, row, HALF)
    for letter in ("K", "T", "KT"):
        printed = row[letter]
        fits = printed is None or low[letter] - HALF <= printed <= high[letter] + HALF
        misprint = MISPRINTS.get((group["table"], group["model"], row["method"], letter))
        assert fits == (misprint is None)
        if misprint:
            assert misprint[0] == printed
            assert exact[letter] == pytest.approx(misprint[1], abs=HALF + 1e-9)


def test_every_misprint_is_in_the_record():
    text = (Path(__file__).parents[2] / "PAPERS.md").read_text()
    for (table, model, method, letter), (printed, value) in MISPRINTS.items():
        assert f"| {table} | {model} | {method} | {letter} | {printed:.2f} | {value:.2f} |" in text


@pytest.mark.parametrize(
    ("row", "printed", "scores"),
    [
        ("| 2b | LLaMA2-7B | Full fine-tuning |", 21.14, [35.10, 11.08, 7.38, 25.00, 31.13]),
        ("| 2b | LLaMA2-7B | LoRA-Null |", 22.66, [50.13, 13.07, 6.35, 14.02, 29.89]),
        ("| 8 | LLaMA2-7B | (1, 50, 64) |", 26.98, [5.01, 50.94]),
        ("| 11 | LLaMA3-8B | FARSS(R=155) |", 38.72, [14.34, 62.54, 12.84, 48.78, 54.89]),
    ],
)
def test_averages_that_do_not_follow_are_in_the_record_too(row, printed, scores):
    value = sum(scores) / len(scores)
    assert abs(value - printed) > 2 * HALF
    assert f"{row} Avg | {printed:.2f} | {value + 1e-9:.2f} |" in (Path(__file__).parents[2] / "PAPERS.md").read_text()


def test_the_data_file_holds_all_tables():
    assert [group["table"] for group in PAPER["groups"]] == ["2a", "2b", "2c", "5", "6a", "6b", "6c", *["10"] * 3, *["11"] * 4, *["12"] * 3]
    assert len(ROWS) == 8 * 3 + 6 + 2 * 3 + 8 * 10


def test_balance_is_symmetric_and_below_the_mean():
    assert balance(0.4, 0.8) == balance(0.8, 0.4) == pytest.approx(0.5333, abs=1e-4)
    assert balance(0.0, 0.0) == 0.0
    assert balances(np.array([0.4, 0.0]), np.array([0.8, 0.0])).tolist() == [balance(0.4, 0.8), 0.0]


def test_each_model_has_its_own_reference():
    means = [np.array([[0.2, 0.4, 0.1], [0.3, 0.3, 0.0]]), np.array([[0.5, 0.5, 0.5], [1.0, 0.5, 0.25]])]
    assert mean_ratios(means, [0, 1], [0, 0]).tolist() == [[1.0, 1.5], [1.0, 0.75]]
    assert np.allclose(mean_ratios(means, [0, 1], [2, 0])[0], [1.5, 1.5])


def test_a_ratio_to_nothing_has_no_value():
    assert np.isnan(mean_ratios([np.array([[0.2, 0.0]]), np.array([[0.2, 0.1]])], 0, 1)).all()
    assert mean_ratios([np.array([[-0.2, 0.1]])], 0, 1).tolist() == [0.0]  # likelihood that was lost: nothing was learned


# --- uncertainty -----------------------------------------------------------------------------------------------------


def test_every_model_sees_the_same_resample():
    outcomes = np.random.default_rng(0).integers(0, 2, 50)
    draws = bootstrap([[outcomes, outcomes, 1 - outcomes]], 300, seed=1)[0]
    assert draws.shape == (300, 3)
    assert np.array_equal(draws[:, 0], draws[:, 1])
    assert np.allclose(draws[:, 0] + draws[:, 2], 1)
    assert np.allclose(mean_ratios([draws], 0, 1), 1)


def test_the_seed_decides():
    outcomes = [np.arange(20.0)]
    assert np.array_equal(bootstrap(outcomes, 200, 3)[0], bootstrap(outcomes, 200, 3)[0])
    assert not np.array_equal(bootstrap(outcomes, 200, 3)[0], bootstrap(outcomes, 200, 4)[0])


def test_memory_chunks_do_not_matter_for_the_distribution(monkeypatch):
    outcomes = [np.arange(100.0) / 100]
    whole = interval(bootstrap(outcomes, 2000, 0)[0])
    monkeypatch.setattr("farss.maths.metrics.CHUNK", 1000)
    assert interval(bootstrap(outcomes, 2000, 0)[0]) == pytest.approx(whole, abs=0.01)


def test_interval_of_a_proportion_is_the_binomial_one():
    outcomes = np.r_[np.ones(300), np.zeros(700)]
    low, high = interval(bootstrap([outcomes], 4000, 0)[0])
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.002)


def test_the_interval_covers_95_times_in_a_hundred():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        low, high = interval(bootstrap([generator.random(200) < 0.4], 400, trial)[0])
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_draws_without_a_value_are_left_out():
    assert interval([0.0, np.nan, np.inf, 1.0]) == pytest.approx((0.025, 0.975))
    with pytest.raises(FarssError, match="no bootstrap resample has a value"):
        interval([np.nan])


def test_a_real_difference_is_found_and_none_is_not():
    generator = np.random.default_rng(0)
    before = (generator.random(1000) < 0.5).astype(float)
    worse = before * (generator.random(1000) < 0.9)
    mean, low, high = paired_difference(worse, before)
    assert mean == pytest.approx(worse.mean() - before.mean())
    assert low <= mean <= high < 0
    assert paired_difference(before, before) == (0.0, 0.0, 0.0)


def test_pairing_makes_the_interval_narrower_than_two_separate_ones():
    generator = np.random.default_rng(0)
    before = (generator.random(500) < 0.5).astype(float)
    after = np.where(generator.random(500) < 0.02, 1 - before, before)
    paired, shuffled = (paired_difference(one, before)[1:] for one in (after, generator.permutation(after)))
    assert np.ptp(paired) < 0.5 * np.ptp(shuffled)


def test_p_values_of_many_differences_hold_at_once():
    generator = np.random.default_rng(0)
    first, tries = 0, 300
    for _ in range(tries):
        values = generator.normal(size=20)
        gaps = values + generator.normal(size=(500, 20))
        first += simultaneous_p_values(gaps, values).min() < 0.05
    assert 0.02 < first / tries < 0.08
    one = simultaneous_p_values(generator.normal(2.2, 1.0, (4000, 1)), np.array([2.2]))
    assert one[0] == pytest.approx(0.028, abs=0.01)  # of one alone, the usual one


def test_p_values_where_draws_have_no_value_or_do_not_differ():
    generator = np.random.default_rng(0)
    gap = generator.normal(2.0, 1.0, (2000, 1))
    some = np.where(generator.random((2000, 1)) < 0.6, np.nan, gap)
    assert simultaneous_p_values(some, np.array([2.0]))[0] == pytest.approx(simultaneous_p_values(gap, np.array([2.0]))[0], abs=0.02)
    certain = np.concatenate([np.full((2000, 1), 1.0), np.zeros((2000, 1)), gap], axis=1)  # one that always differs, one that never does
    assert simultaneous_p_values(certain, np.array([1.0, 0.0, 2.0])) == pytest.approx([1 / 2001, 1.0, 0.05], abs=0.02)


def test_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        paired_difference([0, 1], [0, 1, 1])


@pytest.mark.parametrize(("degrees", "limit"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_t_quantiles_are_those_of_the_tables(degrees, limit):
    found = t_quantiles(degrees, 40_001)
    assert np.all(np.diff(found) > 0)
    np.testing.assert_allclose(found, -found[::-1], rtol=1e-6, atol=1e-6)
    assert interval(found) == pytest.approx((-limit, limit), rel=2e-3)
    if degrees == 2:  # the one besides Cauchy's whose quantiles have a formula
        shares = (np.arange(40_001) + 0.5) / 40_001
        np.testing.assert_allclose(found, (2 * shares - 1) / np.sqrt(2 * shares * (1 - shares)), rtol=1e-3, atol=1e-6)
