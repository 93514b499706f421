"""The frontier is read off where methods are equal."""

import random

import pytest

from farss.compare.table import levels
from farss.maths.frontier import kept_at

pytestmark = pytest.mark.usefixtures("no_figures")


def test_a_method_that_stays_behind_takes_no_level_from_the_others():
    assert levels([[0.5, 0.9], [0.4, 0.8]]) == pytest.approx([0.5, 0.65, 0.8])
    assert levels([[0.5, 0.9], [0.4, 0.8], [0.0, 0.1]]) == pytest.approx([0.5, 0.65, 0.8])
    assert levels([[0.5, 0.9], [0.0, 0.1]]) == []
    assert levels([]) == []


def test_the_highest_level_is_the_end_of_a_curve():
    generator = random.Random(0)
    for _ in range(200):
        curves = [[(generator.uniform(-9, 1), generator.uniform(-9, 1)) for _ in range(4)] for _ in range(2)]
        found = levels([[t for t, _ in curve] for curve in curves])
        if found:
            assert any(kept_at(curve, found[-1]) is not None for curve in curves)
