"""Episodes of several steps: out of step, copied, gone on with, and over."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.envs.conftest import actions_of, played

ID = "SD/Classification-Mini-Staged-v0"
SMALL = {"train_size": 40, "validation_size": 20, "test_size": 20}


def test_envs_may_be_out_of_step():
    """As after a masked reset in the middle of their episodes."""
    env = gym.make_vec(ID, num_envs=2, autoreset_mode="Disabled", **SMALL).unwrapped
    env.action_space.seed(0)
    env.reset(seed=[1, 2])
    env.step(env.action_space.sample())
    env.reset(options={"reset_mask": np.array([True, False])})
    ended = [env.step(env.action_space.sample())[2].tolist() for _ in range(2)]
    assert ended == [[False, False], [False, True]]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copied_env_goes_on_in_the_middle_of_an_episode(twin_of):
    env = gym.make(ID, **SMALL).unwrapped
    actions = actions_of(env, 0)
    env.reset(seed=3)
    env.step(actions[0])
    twin = twin_of(env)
    for action in actions[1:]:
        np.testing.assert_equal(twin.step(action), env.step(action))


def test_a_saved_state_goes_on_in_the_middle_of_an_episode():
    envs = [gym.make_vec(ID, num_envs=3, **SMALL).unwrapped for _ in range(2)]
    envs[0].reset(seed=1)
    envs[0].action_space.seed(0)
    observation, *_ = envs[0].step(envs[0].action_space.sample())
    np.testing.assert_array_equal(envs[1].load_state(envs[0].state()), observation)
    for _ in range(5):
        action = envs[0].action_space.sample()
        results = [env.step(action) for env in envs]
        for _, *_, infos in results:
            infos["final_obs"] = list(infos.get("final_obs", []))
        np.testing.assert_equal(results[1], results[0])


def test_an_episode_that_is_over_has_to_be_reset():
    env = gym.make(ID, **SMALL).unwrapped
    played(env, actions_of(env, 0))
    with pytest.raises(gym.error.ResetNeeded, match="the episode is over"):
        env.step(env.action_space.sample())
    assert not torch.is_inference_mode_enabled()
