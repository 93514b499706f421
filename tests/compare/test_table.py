"""The frontier is read off where methods are equal."""

import random

import numpy as np
import pytest

from farss.compare.table import equals, levels
from farss.maths.frontier import kept_at
from farss.report import comparison_markdown
from farss.tasks.outcomes import Estimate
from farss.tasks.standing import Standing

pytestmark = pytest.mark.usefixtures("no_figures")


def test_a_method_that_stays_behind_takes_no_level_from_the_others():
    assert levels([[0.5, 0.9], [0.4, 0.8]]) == pytest.approx([0.53, 0.65, 0.77])
    assert levels([[0.5, 0.9], [0.4, 0.8], [0.0, 0.1]]) == pytest.approx([0.53, 0.65, 0.77])
    assert levels([[0.5, 0.9], [0.0, 0.1]]) == []
    assert levels([]) == []


def test_nor_does_one_that_begins_beyond():
    assert levels([[0.97, 1.0], [0.5, 0.9], [0.4, 0.85]]) == pytest.approx([0.535, 0.675, 0.815])
    assert levels([[0.97, 1.0], [0.9, 0.98], [0.4, 0.85], [0.3, 0.8], [0.2, 0.7]]) == pytest.approx([0.43, 0.55, 0.67])
    assert levels([[0.84, 1.0], [0.5, 0.9], [0.4, 0.85]]) == pytest.approx([0.535, 0.675, 0.815])  # and not the sliver that all three share


def standing_of(t, k, spread=0.0, seed=0):
    generator = np.random.default_rng(seed)
    draws = {"T": t + spread * generator.normal(size=400), "K": k + spread * generator.normal(size=400)}
    return Standing({name: Estimate(value, value, value) for name, value in (("T", t), ("K", k))}, draws, {})


def test_full_fine_tuning_does_not_say_where_the_others_are_compared():
    rivals = {"lora": [standing_of(0.4, 1.0), standing_of(0.9, 0.5)], "farss": [standing_of(0.3, 1.0), standing_of(0.8, 0.6)]}
    high = {"full": [standing_of(0.85, 1.0), standing_of(1.0, 0.1)]}
    found, alone = equals(high | rivals, "T", "K"), equals(rivals, "T", "K")
    assert found["learned"] == alone["learned"] == pytest.approx([0.44, 0.6, 0.76])
    assert {label: found["methods"][label] for label in rivals} == alone["methods"]
    assert [value["value"] for value in found["methods"]["full"]["kept at learned"]] == pytest.approx([1.0, 1.0, 1.0])
    assert equals(high, "T", "K")["learned"] == pytest.approx([0.865, 0.925, 0.985])


def test_what_is_read_off_a_curve_has_the_interval_of_its_draws():
    curve = [standing_of(0.4, 1.0), standing_of(0.9, 0.5)]
    exact = equals({"lora": curve}, "T", "K")["methods"]["lora"]
    for value in [*exact["kept at learned"], *exact["area"]]:
        assert value["low"] == pytest.approx(value["value"]) == value["high"]
    noisy = equals({"lora": [standing_of(0.4, 1.0, 0.01), standing_of(0.9, 0.5, 0.01)]}, "T", "K")["methods"]["lora"]
    middle = noisy["kept at learned"][1]
    assert middle["value"] == pytest.approx(0.75)
    assert 0.01 < middle["high"] - middle["low"] < 0.12
    assert middle["low"] < 0.75 < middle["high"]
    assert equals({"lora": curve, "farss": [standing_of(0.4, 1.0), standing_of(0.6, 0.9)]}, "T", "K")["methods"]["farss"]["area"][0]
    short = equals({"lora": curve, "dora": curve, "farss": [standing_of(0.1, 1.0), standing_of(0.2, 0.9)]}, "T", "K")["methods"]["farss"]
    assert short["kept at learned"] == [None, None, None]
    assert short["area"] == [None]


def test_where_methods_are_equal_in_one_way_alone_the_table_says_so():
    """Of those that never learned equally much, what each had learned where they had kept as much."""
    apart = {"lora": [standing_of(0.1, 1.0), standing_of(0.2, 0.5)], "farss": [standing_of(0.6, 0.9), standing_of(0.9, 0.4)]}
    found = {"curves": {}, "scores": equals(apart, "T", "K"), "likelihoods": equals({}, "T", "K")}
    heads, *rows = (line.split(" | ") for line in comparison_markdown({"frontier": found}).split("\n\n")[-1].splitlines())
    assert [head[:6] for head in heads[1:]] == ["T at K"] * 3
    assert [len(row) for row in rows] == [len(heads)] * 3


def test_some_curve_comes_to_the_highest_level():
    generator = random.Random(0)
    for _ in range(200):
        curves = [[(generator.uniform(-9, 1), generator.uniform(-9, 1)) for _ in range(4)] for _ in range(2)]
        found = levels([[t for t, _ in curve] for curve in curves])
        if found:
            assert any(kept_at(curve, found[-1]) is not None for curve in curves)


def test_no_value_is_read_off_where_a_curve_does_not_surely_come():
    """The resamples that do not come so far are those in which it had forgotten most."""
    steep = [(0.6, 0.95), (0.8, 0.9), (0.85, 0.4)]
    curves = {"steep": [standing_of(*point, 0.03, seed) for seed, point in enumerate(steep)]}
    found = equals(curves | {"far": [standing_of(0.6, 0.9), standing_of(1.0, 0.1)]}, "T", "K")
    assert found["learned"] == pytest.approx([0.625, 0.725, 0.825])
    low, middle, high = found["methods"]["steep"]["kept at learned"]
    assert high is None
    for value in (low, middle):
        assert value["high"] - value["value"] < 3 * (value["value"] - value["low"])
        assert value["value"] - value["low"] < 3 * (value["high"] - value["value"])
