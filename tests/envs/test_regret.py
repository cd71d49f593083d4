"""Regret against the best of all masks."""

import numpy as np
import pytest

from sd_gym.envs.regret import regret, static_regret
from tests.envs.conftest import core_of

ID = "SD/Table-v0"


def matrices(split):
    """Quality and FLOPs ratio of all rows under all masks, one decision after the other."""
    core, rows = split.core, np.arange(len(split))
    decisions = core.masks if core.exhaustive else np.arange(len(core.masks))[:, None]
    came = [core.score(split, rows, np.tile(decision, (len(rows), 1))) for decision in decisions]
    return np.stack([one.quality for one in came], axis=1), np.stack([one.flops_ratio for one in came], axis=1)


def test_regret_is_what_the_best_reward_of_each_instance_is_more(full_table):
    split = core_of(ID, table=full_table).split("test")
    quality, flops = matrices(split)
    rewards = 1 - flops - split.config.reward.penalty * (quality[:, :1] - quality)
    decision = np.array([1, 0, 1, 0, 0, 0, 1])

    def policy(observations):
        return np.tile(decision, (len(observations), 1))

    number = int(np.flatnonzero((split.core.masks == decision).all(axis=1))[0])
    lost = regret(split, policy)
    np.testing.assert_allclose(lost, rewards.max(axis=1) - rewards[:, number], atol=1e-12)
    best = rewards.max(axis=1).mean()
    assert static_regret(split) == pytest.approx(best - max(rewards.mean(axis=0)))
    assert 0 <= static_regret(split) <= lost.mean()
    with pytest.raises(ValueError, match="expected actions of shape"):
        regret(split, lambda observations: np.zeros((len(observations), 2), dtype=int))
