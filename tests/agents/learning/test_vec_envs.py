"""Noise on what is observed while learning."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.learning.vec_envs import OVERFITTING_DECISIONS, noise_deviation
from sd_gym.agents.registry import make_agent
from stable_baselines3.common.logger import configure

TABLE = "SD/Classification-TREC-Table-v1"


def agent_of(**settings):
    return make_agent("ppo", gym.make_vec(TABLE, num_envs=64).unwrapped, seed=0, num_envs=64, batch_size=64, **settings)


def learned(agent, steps, tmp_path, on_rollout=lambda rollout: None, state=None):
    agent.env.reset(seed=0)
    if state is not None:
        agent.load_state(state)
    agent.learn(steps, configure(str(tmp_path), []), on_rollout)
    return agent.policy().state_dict()


def test_there_is_noise_where_rows_are_decided_on_often():
    core = gym.make(TABLE).unwrapped.core
    rows = len(core.split("train"))
    assert noise_deviation(core, "train", None, OVERFITTING_DECISIONS * rows - 1) is None
    assert noise_deviation(core, "train", 0.0, OVERFITTING_DECISIONS * rows) is None
    seen = core.observe(core.split("train"), np.arange(rows)).std(axis=0)
    np.testing.assert_allclose(noise_deviation(core, "train", None, OVERFITTING_DECISIONS * rows), seen, rtol=1e-5)
    np.testing.assert_allclose(noise_deviation(core, "train", 0.5, 1), 0.5 * seen, rtol=1e-5)


def test_what_is_observed_has_that_deviation(tmp_path):
    agent = agent_of(noise=2.0)
    learned(agent, 64, tmp_path)
    core, noisy = agent.env.core, agent.algorithm.env
    seen = [noisy.reset() for _ in range(50)]
    clean = core.observe(core.split("train"), np.arange(len(core.split("train"))))
    # Of independent values variances add up: 1 + 2^2.
    np.testing.assert_allclose(np.concatenate(seen).std(axis=0) / clean.std(axis=0), 5**0.5, rtol=0.1)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_learning_goes_on_as_if_nothing_had_happened(noise, tmp_path):
    state = {}

    def keep(rollout):
        if rollout.steps == 256:
            state.update(deepcopy(agent.state()))

    agent = agent_of(noise=noise)
    whole = learned(agent, 512, tmp_path, keep)
    resumed = learned(agent_of(noise=noise), 512, tmp_path, state=state)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
