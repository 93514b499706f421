"""Curves of knowledge against task."""

import pytest

from farss.maths.frontier import area, frontier, kept_at, learned_at

CURVE = [(0.5, 0.9), (0.8, 0.6), (1.0, 0.2)]


def test_beaten_points_are_left_out():
    assert frontier([*CURVE, (0.4, 0.8), (0.8, 0.5), (0.79, 0.6)]) == CURVE
    assert frontier([]) == []
    assert frontier([(0.3, 0.3), (0.3, 0.4)]) == [(0.3, 0.4)]


def test_a_point_above_the_curve_lifts_it_and_one_that_is_beaten_leaves_it():
    assert kept_at([*CURVE, (0.9, 0.5)], 0.9) == 0.5 > kept_at(CURVE, 0.9)
    for t in (0.2, 0.5, 0.65, 0.8, 0.93, 1.0):
        assert kept_at([*CURVE, (0.7, 0.59)], t) == kept_at(CURVE, t)


def test_a_point_between_shows_where_the_straight_line_was_too_high():
    """So a method of which more rates were tried is not ahead for that alone."""
    assert kept_at([*CURVE, (0.65, 0.7)], 0.65) == 0.7 < kept_at(CURVE, 0.65)


def test_between_the_points_beyond_them_and_the_other_way_round():
    assert kept_at(CURVE, 0.65) == pytest.approx(0.75)
    assert kept_at(CURVE, 0.1) == 0.9
    assert kept_at(CURVE, 1.01) is None
    assert learned_at(CURVE, 0.75) == pytest.approx(0.65)
    assert learned_at(CURVE, 0.1) == 1.0
    assert learned_at(CURVE, 0.95) is None
    for t in (0.5, 0.6, 0.93):
        assert learned_at(CURVE, kept_at(CURVE, t)) == pytest.approx(t)


def test_area_is_the_mean_of_k():
    assert area(CURVE, 0.5, 1.0) == pytest.approx((0.3 * 0.75 + 0.2 * 0.4) / 0.5)
    assert area(CURVE, 0.3, 0.5) == pytest.approx(0.9)
    steps = [kept_at(CURVE, 0.4 + 0.5 * (i + 0.5) / 1000) for i in range(1000)]
    assert area(CURVE, 0.4, 0.9) == pytest.approx(sum(steps) / 1000, abs=1e-4)
    assert area(CURVE, 0.5, 1.1) is None
    assert area(CURVE, 0.5, 0.5) is None
