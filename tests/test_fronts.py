"""Fronts, and the difference at the same quality, worked out by hand."""

import numpy as np
import pytest
from sd_gym.agents.common.fronts import Front, flops_at, flops_at_loss, saved_more

N = 1000
LOST = {share: np.r_[np.zeros(int(share * N)), np.ones(N - int(share * N))] for share in (0.0, 0.05, 0.1)}


def front(*points):
    """A front of (share lost, FLOPs ratio), and the dense decision."""
    lost = np.stack([LOST[share] for share, _ in (*points, (0.0, 1.0))])
    return Front(lost, np.stack([np.full(N, ratio) for _, ratio in (*points, (0.0, 1.0))]))


def test_a_front_is_read_between_its_points():
    quality, flops = np.array([0.9, 1.0, 0.8, 0.95]), np.array([0.4, 1.0, 0.5, 0.6])  # the third is worse and dearer
    assert flops_at(0.9, quality, flops) == pytest.approx(0.4)
    assert flops_at(0.925, quality, flops) == pytest.approx(0.5)
    assert flops_at(0.975, quality, flops) == pytest.approx(0.8)
    assert flops_at(1.0, quality, flops) == pytest.approx(1.0)
    assert flops_at(0.1, quality, flops) == pytest.approx(0.4)  # the front has nothing cheaper


def test_what_is_saved_more_at_the_same_quality():
    mask = front((0.1, 0.5))  # half way to its loss of 0.1 it costs 0.75
    learned = front((0.05, 0.6))
    assert flops_at_loss(mask, 0.05) == pytest.approx(0.75)
    more, low, high = saved_more(learned, mask, 0.05)
    assert more == pytest.approx(0.15)
    assert 0 < low < more < high < 0.4
    nothing, low, high = saved_more(mask, mask, 0.05)
    assert nothing == low == high == 0.0
