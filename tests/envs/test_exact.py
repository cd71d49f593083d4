"""What is exactly known of a table."""

from itertools import combinations

import numpy as np
import pytest

from sd_gym.envs.exact import best_rewards, hull, lower_hull, oracle
from tests.envs.conftest import core_of


@pytest.fixture
def split(table):
    return core_of("SD/Table-v0", table=table).split("train")


def means(split):
    rows = np.arange(len(split))
    quality = split.scoring.of_masks(rows)
    return (quality[:, :1] - quality).mean(axis=0), split.costs.of_masks(rows).mean(axis=0)


def test_the_hull_is_the_best_coin_between_two_masks(split):
    loss, flops = means(split)
    wanted = max(0.0, float(np.median(loss)))
    coins = [float(flops[loss <= wanted].min())]
    for one, other in combinations(range(len(loss)), 2):
        if min(loss[one], loss[other]) <= wanted < max(loss[one], loss[other]):
            share = (wanted - loss[other]) / (loss[one] - loss[other])
            coins.append(share * flops[one] + (1 - share) * flops[other])
    assert hull(split).at(wanted) == pytest.approx(min(coins))
    found = hull(split)
    np.testing.assert_allclose(found.loss, loss[found.number])
    np.testing.assert_allclose(found.flops, flops[found.number])
    with pytest.raises(ValueError, match="expected a loss of at least"):
        hull(split).at(found.loss[0] - 0.1)


def test_the_oracle_chooses_for_each_instance(split):
    """Where none loses any quality, it takes each one's cheapest mask of those that keep it."""
    rows = np.arange(len(split))
    quality, flops = split.scoring.of_masks(rows), split.costs.of_masks(rows)
    best = np.where(quality >= quality.max(axis=1, keepdims=True), flops, np.inf).min(axis=1).mean()
    loss = (quality[:, 0] - quality.max(axis=1)).mean()
    assert oracle(split).at(loss) == pytest.approx(best)
    for wanted in (0.0, 0.02, 0.1):
        assert oracle(split).at(wanted) <= hull(split).at(wanted)


def test_points_on_a_line_or_above_are_left_out():
    found = lower_hull(np.array([0.0, 0.0, 0.1, 0.2, 0.3, 0.1]), np.array([1.0, 0.9, 0.8, 0.7, 0.7, 0.85]))
    assert found.number.tolist() == [1, 3]
    assert found.at(0.05) == pytest.approx(0.85)
    assert found.at(0.9) == pytest.approx(0.7)


def matrices(split):
    """Quality and FLOPs ratio of all rows under all masks, one decision after the other."""
    core, rows = split.core, np.arange(len(split))
    decisions = core.masks if core.exhaustive else np.arange(len(core.masks))[:, None]
    came = [core.score(split, rows, np.tile(decision, (len(rows), 1))) for decision in decisions]
    return np.stack([one.quality for one in came], axis=1), np.stack([one.flops_ratio for one in came], axis=1)


def test_the_best_reward_is_that_of_the_best_mask(full_table):
    split = core_of("SD/Table-v0", table=full_table).split("test")
    quality, flops = matrices(split)
    rewards = 1 - flops - split.config.reward.penalty * (quality[:, :1] - quality)
    np.testing.assert_allclose(best_rewards(split), rewards.max(axis=1), atol=1e-12)
