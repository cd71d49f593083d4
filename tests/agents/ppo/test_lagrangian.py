"""The multiplier of a Lagrangian as a part of an agent; never of the env."""

import json

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from stable_baselines3.common.logger import configure

from sd_gym.envs import ConfigError
from sd_gym.envs.protocols import Outcome

ID, CUSTOM = "SD/Classification-Mini-v0", "SD/Classification-Custom-v0"


def test_a_multiplier_is_not_the_envs():
    with pytest.raises(ConfigError, match=r"ppo_lagrangian.*LagrangianWrapper"):
        gym.make(ID, objective="lagrangian")


def test_an_agent_logs_its_multiplier_and_keeps_it_in_its_state(custom, tmp_path):
    env = gym.make_vec(CUSTOM, num_envs=16, penalty=3.0, epsilon=0.0, **custom).unwrapped
    env.reset(seed=0)
    agent = make_agent("ppo_lagrangian", env, seed=0, multiplier_rate=0.5)
    assert agent.multiplier == 3.0
    agent.learn(512, configure(str(tmp_path), ["json"]), lambda rollout: None)
    last = json.loads((tmp_path / "progress.json").read_text().splitlines()[-1])
    assert last["train/multiplier"] == agent.multiplier != 3.0  # each of few rollouts makes a point of its own
    other = make_agent("ppo_lagrangian", gym.make_vec(CUSTOM, num_envs=16, **custom).unwrapped, seed=1)
    other.load_state(agent.state())
    assert other.multiplier == agent.multiplier


@pytest.mark.parametrize(("limit", "rises"), [(1.0, False), (0.5, True)])
def test_the_multiplier_rises_where_more_than_the_limit_is_lost(limit, rises, custom, tmp_path, monkeypatch):
    env = gym.make_vec(CUSTOM, num_envs=16, penalty=3.0, epsilon=0.1, **custom).unwrapped
    env.reset(seed=0)
    lost = 0.07  # of every instance, whatever is skipped

    def score(split, rows, decisions, resume_from=None):
        reference, ratio = np.ones(len(rows)), np.full(len(rows), 0.5)
        return Outcome(reference - lost, reference, ratio)

    monkeypatch.setattr(env.core, "score", score)
    agent = make_agent("ppo_lagrangian", env, seed=0, limit=limit)
    agent.learn(256, configure(str(tmp_path), []), lambda rollout: None)
    assert (agent.multiplier > 3.0) == rises
