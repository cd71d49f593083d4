"""Other conventions around an env: a cost beside the reward, and the multiplier of a Lagrangian."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from sd_gym.envs.wrappers import LagrangianVectorWrapper, LagrangianWrapper, SafetyWrapper
from tests.envs.conftest import ID, SMALL

STAGED = "SD/Classification-Mini-Staged-v0"
KEYS = {**SMALL, "epsilon": 0.1, "penalty": 3.0, "cost_scale": 0.5}


def by_hand(info, multiplier, rate):
    """Rewards ``[n]`` of a step, and the multiplier after it."""
    missing = (np.array(info["quality_ref"]) - 0.1 - info["quality"]) / 0.5
    return 1 - np.array(info["flops_ratio"]) - multiplier * missing, max(0.0, multiplier + rate * missing.sum())


@pytest.mark.parametrize("identity", [ID, STAGED])
def test_a_safe_episode_earns_what_it_saves(identity):
    env = SafetyWrapper(gym.make(identity, **SMALL))
    for skip in (0, 1):
        env.reset(seed=0)
        over, rewards, costs = False, [], []
        while not over:
            _, reward, cost, over, _, info = env.step((env.action_space.nvec - 1) * skip)
            rewards.append(reward)
            costs.append(cost)
        assert sum(rewards) == 1 - info["flops_ratio"]
        assert sum(costs) == info["quality_ref"] - info["quality"]


@pytest.mark.parametrize("identity", [ID, STAGED])
def test_a_single_env_gives_savings_less_the_multiplier_times_what_is_missing(identity):
    env, multiplier = LagrangianWrapper(gym.make(identity, **KEYS), rate=0.7), 3.0
    env.action_space.seed(0)
    multipliers = {multiplier}
    for episode in range(12):
        env.reset(seed=episode)
        over, rewards = False, []
        while not over:
            _, reward, over, _, info = env.step(env.action_space.sample())
            assert type(reward) is float
            rewards.append(reward)
        expected, multiplier = by_hand({key: [info[key]] for key in info}, multiplier, 0.7)
        assert rewards == [*[0.0] * (len(rewards) - 1), pytest.approx(expected[0])]
        assert env.lagrangian.multiplier == pytest.approx(multiplier)
        multipliers.add(multiplier)
    assert len(multipliers) > 3


@pytest.mark.parametrize("identity", [ID, STAGED])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_vector_env_does_so_in_every_autoreset_mode(mode, identity):
    vector = gym.make_vec(identity, num_envs=5, autoreset_mode=mode, **KEYS)
    env, multiplier, decided = LagrangianVectorWrapper(vector, multiplier=2.0, rate=0.7), 2.0, 0
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(16):
        _, rewards, over, _, infos = env.step(env.action_space.sample())
        outcome, expected = infos.get("final_info", infos), np.zeros(5)
        if over.any():
            one = {key: outcome[key][over] for key in ("quality", "quality_ref", "flops_ratio")}
            expected[over], multiplier = by_hand(one, multiplier, 0.7)
            decided += 1
        np.testing.assert_allclose(rewards, expected)
        assert env.lagrangian.multiplier == pytest.approx(multiplier)
        if mode == AutoresetMode.DISABLED and over.any():
            env.reset(options={"reset_mask": over})
    assert decided >= 4
    assert multiplier != 2.0


def test_the_wrapped_env_is_as_it_was():
    env, wrapped = gym.make(ID, **KEYS), LagrangianWrapper(gym.make(ID, **KEYS), rate=5)
    for one in (env, wrapped):
        one.reset(seed=0)
    dense = np.zeros(env.action_space.shape, dtype=int)
    for _ in range(3):
        assert env.step(dense)[1] == wrapped.env.step(dense)[1] == 0.0
        for one in (env, wrapped):
            one.reset()
    again = gym.make(wrapped.spec)
    assert (type(again), again.lagrangian.rate) == (LagrangianWrapper, 5)
    assert pickle.loads(pickle.dumps(wrapped)).lagrangian.multiplier == 3.0


@pytest.mark.parametrize("key", ["reward.vector", "reward.dense"])
def test_other_rewards_are_refused(key):
    env = gym.make_vec(STAGED, num_envs=2, **{key: True}, **SMALL)
    with pytest.raises(ValueError, match=f"one reward an episode, but the env has {key}=True; leave it out"):
        LagrangianVectorWrapper(env)


@pytest.mark.parametrize("wrapper", [LagrangianWrapper, SafetyWrapper])
def test_queues_are_refused(wrapper):
    env = gym.make("SD/Serving-TREC-Table-v0")
    with pytest.raises(ValueError, match=r"whose steps skip parts of a backbone, got .*; queues have other rewards"):
        wrapper(env)


def test_the_safety_wrapper_has_a_cost_beside_the_reward(tiny):
    env = SafetyWrapper(gym.make(**tiny))
    env.action_space.seed(0)
    costs = []
    for seed in range(20):
        env.reset(seed=seed)
        observation, reward, cost, terminated, truncated, info = env.step(env.action_space.sample())
        assert observation in env.observation_space
        assert (terminated, truncated) == (True, False)
        assert (reward, cost) == (1 - info["flops_ratio"], info["cost"])
        assert (type(reward), type(cost)) == (float, float)
        costs.append(cost)
    assert min(costs) < 0 < max(costs)  # gains count, as losses do
