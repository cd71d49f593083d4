"""Names of agents and of their settings."""

import pytest
import torch
from sd_gym.agents import agent_names, make_agent
from sd_gym.agents.experiment.run import split_settings


def test_names_and_settings_are_checked(env):
    assert "blind-a2c" in agent_names()
    with pytest.raises(ValueError, match=r"unknown agent 'reinforc'; did you mean 'reinforce'"):
        make_agent("reinforc", env)
    with pytest.raises(ValueError, match=r"unknown setting 'learning_rat' of PPOAgent; did you mean 'learning_rate'"):
        make_agent("ppo", env, learning_rat=1)
    with pytest.raises(ValueError, match="setting 'learning_rate' of PPOAgent: Input should be greater than 0, got -1"):
        make_agent("ppo", env, learning_rate=-1)
    with pytest.raises(ValueError, match=r"unknown setting 'foo'. The env has task.*; ppo has num_envs"):
        split_settings("ppo", {"foo": 1})
    assert split_settings("ppo", {"penalty": 1, "n_steps": 2}) == ({"penalty": 1}, {"n_steps": 2})


@pytest.mark.parametrize("name", ["reinforce", "imitation"])
def test_a_new_agent_looks_at_no_device_and_keeps_the_random_state(name, env, monkeypatch):
    asked, state = [], torch.get_rng_state()

    def fork(devices=None, inner=torch.random.fork_rng):
        asked.append(devices)
        return inner([])

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    make_agent(name, env, seed=3)
    assert asked
    assert all(devices == [] for devices in asked)  # None is every GPU
    assert torch.equal(torch.get_rng_state(), state)
