"""The multiplier of a Lagrangian: a wrapper around an env for any algorithm, a part of an agent; never of the env."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from sd_gym.agents import make_agent
from stable_baselines3.common.logger import configure

from sd_gym.envs import ConfigError
from sd_gym.envs.protocols import Outcome
from sd_gym.envs.wrappers import LagrangianVectorWrapper, LagrangianWrapper
from sd_gym.objectives import quality_cost

ID, STAGED, CUSTOM = "SD/Classification-Mini-v0", "SD/Classification-Mini-Staged-v0", "SD/Classification-Custom-v0"
SMALL = {"train_size": 60, "validation_size": 20, "test_size": 20}
KEYS = {**SMALL, "epsilon": 0.1, "penalty": 3.0, "cost_scale": 0.5}


@pytest.fixture
def custom(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone)}


def by_hand(info, multiplier, rate):
    """Rewards ``[n]`` of a step, and the multiplier after it."""
    missing = (np.array(info["quality_ref"]) - 0.1 - info["quality"]) / 0.5
    return 1 - np.array(info["flops_ratio"]) - multiplier * missing, max(0.0, multiplier + rate * missing.sum())


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


def test_a_multiplier_is_not_the_envs():
    with pytest.raises(ConfigError, match=r"ppo_lagrangian.*LagrangianWrapper"):
        gym.make(ID, objective="lagrangian")


def test_an_agent_logs_its_multiplier_and_keeps_it_in_its_state(custom, tmp_path):
    env = gym.make_vec(CUSTOM, num_envs=16, penalty=3.0, epsilon=0.0, **custom).unwrapped
    env.reset(seed=0)
    agent, logged = make_agent("ppo_lagrangian", env, seed=0, multiplier_rate=0.5), []
    assert agent.multiplier == 3.0
    logger = configure(str(tmp_path), [])
    logger.record = lambda key, value, *args, **kwargs: logged.append(value) if key == "train/multiplier" else None
    agent.learn(512, logger, lambda rollout: None)
    assert logged[-1] == agent.multiplier != 3.0
    other = make_agent("ppo_lagrangian", gym.make_vec(CUSTOM, num_envs=16, **custom).unwrapped, seed=1)
    other.load_state(agent.state())
    assert other.multiplier == agent.multiplier


@pytest.mark.parametrize(("limit", "rises"), [(1.0, False), (0.5, True)])
def test_the_multiplier_rises_where_more_than_the_limit_is_lost(limit, rises, custom, tmp_path, monkeypatch):
    env = gym.make_vec(CUSTOM, num_envs=16, penalty=3.0, epsilon=0.1, **custom).unwrapped
    env.reset(seed=0)
    lost = 0.07  # of every instance, whatever is skipped

    def score(split, rows, decisions, seen=None):
        reference, ratio = np.ones(len(rows)), np.full(len(rows), 0.5)
        return Outcome(reference - lost, reference, quality_cost(reference - lost, reference, 0.1), ratio)

    monkeypatch.setattr(env.core, "score", score)
    agent = make_agent("ppo_lagrangian", env, seed=0, limit=limit)
    agent.learn(256, configure(str(tmp_path), []), lambda rollout: None)
    assert (agent.multiplier > 3.0) == rises
