"""An env whose optimum is known by hand, under each view of its reward.

Five instances and three masks. Dense errs on the first instance; what each mask gets right, and runs:

| mask | 1 | 2 | 3 | 4 | 5 | mean cost | FLOPs |
| --- | --- | --- | --- | --- | --- | --- | --- |
| dense | no | yes | yes | yes | yes | 0 | 1.0 |
| half | yes | no | yes | yes | yes | 0: one gained, one lost | 0.5 |
| bold | yes | no | no | yes | yes | 0.2: one gained, two lost | 0.2 |

So at an epsilon of 0.1 half is the best mask for all. Who ignores gains finds dense.
"""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

from sd_gym.envs.exact import best_rewards
from sd_gym.envs.table import TableSplit
from sd_gym.envs.wrappers import LagrangianWrapper, SafetyWrapper

RIGHT = np.array([[0, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 0, 0, 1, 1]], dtype=float).T  # [instances, masks]
FLOPS = np.array([1.0, 0.5, 0.2])
DENSE, HALF, BOLD = range(3)
COUNTED = [0, 0.5, 0.8 - 5 * 0.2]  # mean reward of each mask: savings less 5 times the mean cost
IGNORED = [0, (4 * 0.5 - 5 * 0.9) / 5, (3 * 0.8 - 2 * 5 * 0.9) / 5]


@pytest.fixture
def make(small_table, monkeypatch):
    """Makes the env; other masks of the table are worth nothing."""

    def made(**keys):
        env = gym.make(
            "SD/Table-v0", table=small_table, split="train", epsilon=0.1, penalty=5.0, disable_env_checker=True, **keys
        )
        core = env.unwrapped.core
        quality = np.zeros((len(RIGHT), len(core.masks)))
        quality[:, : len(FLOPS)] = RIGHT
        flops = np.append(FLOPS, np.ones(len(core.masks) - len(FLOPS)))
        split = core.split("train")
        scoring = SimpleNamespace(
            quality=lambda rows, decisions, resume_from: (
                quality[rows, core.masks_of(decisions)],
                quality[rows, DENSE],
            ),
            of_masks=lambda rows: quality[rows],
            of_one=lambda row, number: (quality[row, number], quality[row, DENSE]),
        )
        costs = SimpleNamespace(
            flops_ratio=lambda rows, decisions: flops[core.masks_of(decisions)],
            of_masks=lambda rows: np.tile(flops, (len(rows), 1)),
            ratio_of_one=lambda row, number: flops[number],
        )
        monkeypatch.setattr(split, "scoring", scoring)
        monkeypatch.setattr(split, "costs", costs)
        monkeypatch.setattr(TableSplit, "__len__", lambda split: len(RIGHT))
        return env

    return made


def outcomes(env):
    """What ``step`` gives for each instance under each mask, but the observation: ``[masks][instances]``."""
    ids = env.unwrapped.core.split("train").ids[: len(RIGHT)]
    steps = [[(env.reset(options={"instance": one}), env.step(mask))[1][1:] for one in ids] for mask in range(3)]
    assert not any(info["is_success"] != (info["cost"] <= 0.1) for of_mask in steps for *_, info in of_mask)
    return steps


def column(steps, number=0):
    """One of the values of ``outcomes``, ``[masks, instances, ...]``."""
    return np.array([[step[number] for step in of_mask] for of_mask in steps])


@pytest.mark.parametrize(("gains", "means"), [("counted", COUNTED), ("ignored", IGNORED)])
def test_the_reward_and_the_best_reward(make, gains, means):
    env = make(gains=gains)
    rewards = column(outcomes(env))
    np.testing.assert_allclose(rewards.mean(axis=1), means)
    assert rewards.mean(axis=1).argmax() == (HALF if gains == "counted" else DENSE)
    # Instance by instance the two agree: there is nothing to balance.
    assert rewards.argmax(axis=0).tolist() == [BOLD, DENSE, HALF, BOLD, BOLD]
    split = env.unwrapped.core.split("train")
    best = [0.8 + 5 * (gains == "counted"), 0, 0.5, 0.8, 0.8]
    np.testing.assert_allclose(best_rewards(split), best)


def test_the_highest_and_the_lowest_reward_are_within_the_range(make):  # from -5 to 1 + 5
    rewards = column(outcomes(make()))
    assert rewards.max() == pytest.approx(1 + 5 - 0.2)
    assert rewards.min() == pytest.approx(-5 + 0.5)


def test_a_lagrangian_adds_only_what_may_be_lost(make):
    steps = outcomes(LagrangianWrapper(make(), rate=0.0))
    np.testing.assert_allclose(column(steps).mean(axis=1), np.array(COUNTED) + 5 * 0.1)


def test_the_safety_view_has_the_constraint_of_the_verdict(make):
    steps = outcomes(SafetyWrapper(make()))
    savings, cost = column(steps).mean(axis=1), column(steps, 1).mean(axis=1)
    np.testing.assert_allclose(savings, 1 - FLOPS)
    np.testing.assert_allclose(cost, [0, 0, 0.2])
    assert np.where(cost <= 0.1, savings, -np.inf).argmax() == HALF


def test_the_vector_reward_weighed_by_the_penalty_is_the_reward(make):
    vectors, rewards = column(outcomes(make(vector_reward=True))), column(outcomes(make()))
    np.testing.assert_allclose(vectors @ [5.0, 1.0] + 1 - 5 * RIGHT[:, DENSE], rewards, atol=1e-6)
    assert (vectors.mean(axis=1) @ [5.0, 1.0]).argmax() == HALF
