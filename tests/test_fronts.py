"""Fronts, and the difference at the same quality, worked out by hand."""

import numpy as np
import pytest
from sd_gym.agents.common.fronts import Front, flops_at, saved_more


def test_a_front_is_read_between_its_points():
    quality, flops = np.array([0.9, 1.0, 0.8, 0.95]), np.array([0.4, 1.0, 0.5, 0.6])  # the third is worse and dearer
    assert flops_at(0.9, quality, flops) == pytest.approx(0.4)
    assert flops_at(0.925, quality, flops) == pytest.approx(0.5)
    assert flops_at(0.975, quality, flops) == pytest.approx(0.8)
    assert flops_at(1.0, quality, flops) == pytest.approx(1.0)
    assert flops_at(0.1, quality, flops) == pytest.approx(0.4)  # the front has nothing cheaper


def test_what_is_saved_more_at_the_same_quality():
    n = 1000
    lost_by_half = np.r_[np.zeros(100), np.ones(900)]  # a mask that costs half and loses a tenth
    front = Front(np.stack([lost_by_half, np.ones(n)]), np.stack([np.full(n, 0.5), np.ones(n)]))
    quality = np.r_[np.zeros(50), np.ones(950)]  # at 95% the front costs 0.75
    more, low, high = saved_more(quality, np.full(n, 0.6), front)
    assert more == pytest.approx(0.15)
    assert 0 < low < more < high < 0.4
    nothing, low, high = saved_more(lost_by_half, np.full(n, 0.5), front)
    assert nothing == pytest.approx(0.0)
    assert low <= 0.0 <= high
