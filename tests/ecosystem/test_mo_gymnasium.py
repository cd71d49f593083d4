"""MO-Gymnasium: the reward as a vector, its wrappers, its vector env."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import sd_gym  # noqa: F401  (registers the ids)

PINS = ["mo-gymnasium==1.3.2"]
mo_gymnasium = pytest.importorskip("mo_gymnasium")

ENV = {"env_name": "SD/Classification-Mini-v0", "train_size": 60, "validation_size": 20, "test_size": 20}


def test_a_linear_reward_weighs_the_vector():
    weight = np.array([2.0, 0.5])
    env = mo_gymnasium.wrappers.LinearReward(mo_gymnasium.make(**ENV, vector_reward=True), weight=weight)
    env.reset(seed=0)
    env.action_space.seed(0)
    action = env.action_space.sample()
    _, reward, *_, info = env.step(action)
    assert reward == pytest.approx(2 * info["quality"] - 0.5 * info["flops_ratio"])
    np.testing.assert_array_equal(info["reward_weights"], weight)
    with pytest.warns(UserWarning, match="different from the unwrapped version"):
        check_env(mo_gymnasium.wrappers.LinearReward(mo_gymnasium.make(**ENV, vector_reward=True).unwrapped))


def test_other_wrappers_take_the_vector_too():
    env = mo_gymnasium.make(**ENV, vector_reward=True)
    env = mo_gymnasium.wrappers.MONormalizeReward(mo_gymnasium.wrappers.MOClipReward(env, 1, -0.5, 0.0), idx=0)
    env = mo_gymnasium.wrappers.MORecordEpisodeStatistics(env)
    env.reset(seed=0)
    _, reward, *_, info = env.step(np.zeros(31, dtype=int))  # dense: minus 1 is clipped
    assert (reward.shape, reward[1]) == ((2,), -0.5)
    np.testing.assert_array_equal(info["episode"]["r"], reward)


def test_our_vector_env_is_that_of_the_library():
    ours = gym.make_vec(ENV["env_name"], num_envs=2, vector_reward=True, train_size=60).unwrapped
    vector = mo_gymnasium.wrappers.vector
    theirs = vector.MOSyncVectorEnv([lambda: mo_gymnasium.make(**ENV, vector_reward=True)] * 2)
    assert ours.reward_space == theirs.reward_space
    actions = np.zeros((2, 31), dtype=int)
    actions[1, :-1:2] = 1
    rewards = []
    for env in (ours, theirs):
        env.reset(seed=0, options={"instance": "train-1"})
        rewards.append(env.step(actions)[1])
    np.testing.assert_array_equal(*rewards)
    recorded = vector.MORecordEpisodeStatistics(ours)
    recorded.reset(seed=0)
    assert recorded.step(actions)[1].shape == (2, 2)
