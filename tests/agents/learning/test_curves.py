"""Curves have the same number of points however often an agent dumps, and lose nothing between them."""

import pytest
from sd_gym.agents.learning.curves import CurveLogger
from stable_baselines3.common.logger import Logger

from tests.agents.conftest import Points


def points_of(steps, total, done=0, stages=1):
    """The points of an agent that dumps at these steps, and each time records the step."""
    written = Points()
    logger = CurveLogger(Logger(None, [written]), total, done, stages)
    for step in steps:
        logger.record("step", step)
        logger.dump(step)
    return written.points


@pytest.mark.parametrize("rollout", [1, 10, 64, 256])
def test_a_curve_has_at_most_96_points_and_ends_with_the_last_rollout(rollout):
    steps = range(rollout, 20_000 + rollout, rollout)
    points = points_of(steps, 20_000)
    assert 75 <= len(points) <= 96
    assert points[-1][0] == steps[-1]


def test_a_point_is_the_mean_since_the_one_before():
    points = points_of(range(1, 961), 960)
    assert [step for step, _ in points] == list(range(10, 961, 10))
    assert [values["step"] for _, values in points] == pytest.approx([step - 4.5 for step, _ in points])


def test_short_runs_and_long_rollouts_make_a_point_each():
    assert points_of([64], 50) == [(64, {"step": 64})]
    assert [step for step, _ in points_of([600, 1200], 1000)] == [600, 1200]


def test_a_run_that_goes_on_makes_the_points_that_are_left_and_counts_decisions():
    whole, rest = points_of(range(3, 579, 3), 192, stages=3), points_of(range(291, 579, 3), 192, 96, stages=3)
    assert [step for step, _ in whole] == list(range(2, 193, 2))
    assert rest == whole[48:]
