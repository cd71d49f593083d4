"""The guarantee of selection: how often it takes a point that truly loses epsilon, and the order of points."""

import numpy as np
import pytest
from sd_gym.agents.runs.guarantee import guarantee, measured_loss, sequence

from benchmarks.guarantee import false_selections


@pytest.mark.parametrize("n", [300, 2000])
@pytest.mark.parametrize("disagreement", [0.01, 0.1])
def test_what_loses_epsilon_is_rarely_selected(n, disagreement):
    simulations = 300
    false = false_selections(n, disagreement, simulations=simulations).false
    assert false <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / simulations)


def lost(*counts, rows=1000):
    """Losses of points ``[points, rows]``: so many rows lose all."""
    return np.stack([np.arange(rows) < count for count in counts]).astype(float)


def test_points_come_from_dense_to_bold():
    flops = np.array([0.2, 0.9, 0.5, 1.0, 1.1])
    order = sequence(flops, lost(20, 0, 5, 0, 0), np.arange(5))
    assert order.tolist() == [1, 2, 0]  # what runs no less than dense is no point


def test_what_a_cheaper_point_of_another_policy_beats_is_left_out():
    flops, losses = np.array([0.9, 0.5, 0.2]), lost(30, 5, 20)
    assert sequence(flops, losses, np.arange(3)).tolist() == [1, 2]
    assert sequence(flops, losses, np.zeros(3)).tolist() == [0, 1, 2]  # versions of one policy are a path already


def test_a_point_that_only_by_chance_loses_more_than_a_cheaper_one_is_kept():
    """Of 500 rows the dearer one loses 6, the cheaper one 5 others; that 60 are more than 5 is no chance."""
    flops, losses = np.array([0.9, 0.5]), lost(6, 5, rows=500)
    losses[1] = losses[1, ::-1]
    assert sequence(flops, losses, np.arange(2)).tolist() == [0, 1]
    losses[0, :60] = 1
    assert sequence(flops, losses, np.arange(2)).tolist() == [1]


def test_points_that_show_no_loss_are_all_there():
    """On rows that were learned by heart nothing is lost, and elsewhere the boldest may lose much."""
    flops = np.linspace(0.1, 0.99, 10)
    assert len(sequence(flops, lost(*[0] * 10), np.arange(10))) >= 8


def test_a_point_that_changes_few_answers_goes_before_one_that_changes_many():
    """Both lose as much on the policy rows, but the bound of the second one is higher, and a test would ask for it."""
    few, many = lost(2), lost(42)
    many[:, -40:] = -1
    for flops in ([0.501, 0.5, 0.1], [0.5, 0.501, 0.1]):
        assert sequence(np.array(flops), np.concatenate([few, many, lost(99)]), np.arange(3)).tolist() == [0, 2]
    flops = np.array([0.6, 0.4, 0.1])
    assert sequence(flops, np.concatenate([many, few, lost(99)]), np.arange(3)).tolist() == [1, 2]


def test_a_long_path_is_thinned_to_even_steps():
    flops = np.linspace(0.1, 0.99, 500)
    losses = lost(*range(500, 0, -1))
    order = sequence(flops, losses, np.arange(500))
    assert 25 <= len(order) <= 30
    steps = -np.diff(flops[order])
    np.testing.assert_allclose(steps[1:], 0.9 / 30, atol=0.002)
    assert len(sequence(flops, losses, np.arange(500), 12)) <= 12
    assert sequence(np.ones(3), lost(0, 0, 0), np.arange(3)).tolist() == []


def test_the_guarantee_in_words():
    assert guarantee(1892, 0.01, 0.95, False) == "selected on 1,892 rows: loses less than 1 point with 95% confidence"
    assert guarantee(300, 0.005, 0.9, True) == (
        "dense: on 300 rows no operating point is shown to lose less than 0.5 points with 90% confidence"
    )
    result = {"instances": 2000, "split": "test", "quality_difference": -0.006}
    result["quality_difference_interval"] = (-0.011, -0.001)
    assert measured_loss(result) == "on 2,000 test rows it lost 0.6 (0.1 to 1.1)"
    result |= {"quality_difference": 0.0, "quality_difference_interval": (-0.0001, 0.0001)}
    assert measured_loss(result) == "on 2,000 test rows it lost 0.0 (0.0 to 0.0)"
