"""Fronts, and the difference at the same quality, worked out by hand."""

import numpy as np
import pytest
from sd_gym.agents.runs.fronts import Front, flops_at, flops_at_loss, flops_samples

N = 1000
LOST = {share: np.r_[np.zeros(int(share * N)), np.ones(N - int(share * N))] for share in (0.0, 0.05, 0.1)}


def front(*points):
    """A front of (share lost, FLOPs ratio), and the dense decision."""
    lost = np.stack([LOST[share] for share, _ in (*points, (0.0, 1.0))])
    return Front(lost, np.stack([np.full(N, ratio) for _, ratio in (*points, (0.0, 1.0))]))


def test_a_front_is_the_cheapest_mix_of_two_points():
    quality, flops = np.array([0.9, 1.0, 0.8, 0.95]), np.array([0.4, 1.0, 0.5, 0.6])  # the third is worse and dearer
    assert flops_at(0.9, quality, flops) == pytest.approx(0.4)
    assert flops_at(0.925, quality, flops) == pytest.approx(0.5)
    assert flops_at(0.975, quality, flops) == pytest.approx(0.8)
    assert flops_at(1.0, quality, flops) == pytest.approx(1.0)
    assert flops_at(0.1, quality, flops) == pytest.approx(0.4)  # the front has nothing cheaper
    flops[3] = 0.8  # dearer than half of the one and half of the other
    assert flops_at(0.95, quality, flops) == pytest.approx(0.7)
    assert flops_at(0.95, np.append(quality, 0.9), np.append(flops, 0.7)) == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"quality of at most 0\.9000, got 0\.9500"):
        flops_at(0.95, quality[:1], flops[:1])


def test_fronts_are_compared_at_the_same_quality_on_the_same_instances():
    mask = front((0.1, 0.5))  # half way to its loss of 0.1 it costs 0.75
    learned = front((0.05, 0.6))
    masks, agent = (flops_samples(one, [0.05, 0.1]) for one in (mask, learned))
    assert masks.shape == (2, 2001)
    assert masks[0, 0] == pytest.approx(0.75) == flops_at_loss(mask, 0.05)
    assert masks[1, 0] == pytest.approx(0.5)
    more = masks[0] - agent[0]
    assert more[0] == pytest.approx(0.15)
    low, high = np.percentile(more[1:], [2.5, 97.5])
    assert 0 < low < more[0] < high < 0.4
    # A sample of the mask's loss alone: 1,000 instances of which a tenth is lost, read at half of that.
    lost = np.random.default_rng(1).binomial(N, 0.1, size=4000) / N
    assert masks[0, 1:].std() == pytest.approx(np.std(1 - 0.5 * 0.05 / lost), rel=0.1)
    np.testing.assert_array_equal(flops_samples(mask, [0.05]), masks[:1])
