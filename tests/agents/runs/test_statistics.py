"""Aggregates of a few runs: worked out by hand, invariants, and the same as rliable's where that is installed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_gym.agents.runs.statistics import (
    aggregate,
    curve_interval,
    hypervolume,
    interquartile_mean,
    pareto_front,
    performance_profile,
    probability_of_improvement,
)

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


def matrix(seed, runs=10, envs=3):
    """Scores of some runs on some envs, ``[runs, envs]``, rounded so that some are equal."""
    return np.random.default_rng(seed).normal(0.5 + 0.05 * seed, 0.2, size=(runs, envs)).round(1)


def test_an_outlier_does_not_move_the_interquartile_mean():
    assert interquartile_mean(np.array([1.0, 2, 3, 4])) == 2.5
    assert interquartile_mean(np.array([1.0, 2, 3, 400])) == 2.5
    assert interquartile_mean(np.array([1.0, 2, 3])) == 2.0  # three runs have no quarter
    assert interquartile_mean(np.array([[1.0, 2, 3, 4], [2.0, 3, 4, 5]])).tolist() == [2.5, 3.5]


def test_each_env_is_drawn_on_its_own():
    """Where all runs of an env are equal there is no luck, however far apart envs are."""
    mean, low, high = aggregate([np.full(5, 0.1), np.full(7, 0.9)])
    assert mean == low == high == pytest.approx((0.1 * 2 + 0.9 * 4) / 6)


def test_more_runs_make_an_interval_narrower():
    random = np.random.default_rng(0)
    few, many = (aggregate([random.normal(size=n)]) for n in (5, 500))
    for mean, low, high in (few, many):
        assert low <= mean <= high
    assert many[2] - many[1] < 0.3 * (few[2] - few[1])
    assert aggregate([np.arange(9.0)]) == aggregate([np.arange(9.0)])


def test_a_profile_falls_from_all_runs_to_none():
    scores = [np.array([0.2, 0.4]), np.array([0.6, 0.8, 1.0])]
    share, low, high = performance_profile(scores, np.array([0.0, 0.2, 0.5, 1.0]))
    assert share.tolist() == [1, 0.8, 0.6, 0]
    assert (low <= share).all()
    assert (share <= high).all()


def test_the_probability_of_improvement_counts_pairs():
    assert probability_of_improvement([np.array([2.0, 3])], [np.array([1.0, 1])])[0] == 1
    assert probability_of_improvement([np.array([1.0, 3])], [np.array([1.0, 2, 4])])[0] == pytest.approx(2.5 / 6)
    assert probability_of_improvement([np.ones(3)], [np.ones(3)]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="same envs, got 1 and 2"):
        probability_of_improvement([np.ones(3)], [np.ones(3)] * 2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
@settings(deadline=None)
def test_one_is_better_or_the_other(one, other):
    one, other = [np.array(one)], [np.array(other)]
    there = probability_of_improvement(one, other, samples=2)[0]
    back = probability_of_improvement(other, one, samples=2)[0]
    assert there + back == pytest.approx(1)


def test_curves_are_drawn_as_a_whole():
    curves = np.array([[0.0, 1, 2], [1, 2, 3], [2, 3, 4]])
    mean, low, high = curve_interval(curves)
    assert mean.tolist() == [1, 2, 3]
    np.testing.assert_allclose(np.diff(low), 1)
    np.testing.assert_allclose(np.diff(high), 1)


@given(POINTS)
def test_the_front_is_what_nothing_beats_and_its_area_is_that_of_all_points(points):
    quality, flops = np.array(points, dtype=float).reshape(-1, 2).T
    front = pareto_front(quality, flops)

    def beaten(one):
        others = zip(quality, flops, strict=True)
        return any(q >= quality[one] and f <= flops[one] and (q, f) != (quality[one], flops[one]) for q, f in others)

    assert {(quality[one], flops[one]) for one in front} == {
        (quality[one], flops[one]) for one in range(len(points)) if not beaten(one)
    }
    cells = sum(
        any(q > i and f <= j for q, f in points)  # the square from i to i + 1, and j to j + 1
        for i in range(6)
        for j in range(6)
    )
    assert hypervolume(quality, flops, (0.0, 6.0)) == pytest.approx(cells)


def test_the_same_as_rliable():
    library = pytest.importorskip("rliable.library", exc_type=ImportError)
    metrics = pytest.importorskip("rliable.metrics", exc_type=ImportError)
    first, second = matrix(0), matrix(1, runs=8)
    columns = [list(one.T) for one in (first, second)]
    for one, scores in zip((first, second), columns, strict=True):
        mean, low, high = aggregate(scores, samples=20_000)
        assert mean == pytest.approx(metrics.aggregate_iqm(one))
        _, intervals = library.get_interval_estimates(
            {"a": one}, lambda drawn: np.array([metrics.aggregate_iqm(drawn)]), reps=20_000
        )
        np.testing.assert_allclose([low, high], intervals["a"][:, 0], atol=0.004)
    thresholds = np.linspace(0, 1, 11)
    share, low, high = performance_profile(columns[0], thresholds, samples=5_000)
    shares, intervals = library.create_performance_profile({"a": first}, thresholds, reps=5_000)
    np.testing.assert_allclose(share, shares["a"])
    np.testing.assert_allclose([low, high], intervals["a"], atol=0.04)  # a run in 30 more or less
    better, low, high = probability_of_improvement(*columns, samples=5_000)
    assert better == pytest.approx(metrics.probability_of_improvement(first, second))
    _, intervals = library.get_interval_estimates(
        {"ab": [first, second]},
        lambda one, other: np.array([metrics.probability_of_improvement(one, other)]),
        reps=2_000,
    )
    np.testing.assert_allclose([low, high], intervals["ab"][:, 0], atol=0.02)
