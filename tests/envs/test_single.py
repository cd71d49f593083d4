"""Copies of a single env."""

import gymnasium as gym
import pytest

from tests.envs.conftest import COPIES, ID, SMALL, assert_same


@pytest.mark.parametrize("twin_of", COPIES)
def test_a_copied_env_goes_on_with_the_running_episode(twin_of):
    env = gym.make(ID, **SMALL)
    env.action_space.seed(0)
    env.reset(seed=11)
    env.step(env.action_space.sample())
    env.reset()
    twin = twin_of(env)
    assert twin.unwrapped.core is env.unwrapped.core
    assert twin.unwrapped._episode.split is env.unwrapped._episode.split
    for one in (env, twin):
        one.trace = [one.step(one.action_space.sample()), one.reset(), one.step(one.action_space.sample())]
    assert_same(env.trace, twin.trace)
