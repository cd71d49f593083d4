"""What infos hold, and what reset takes."""

import gymnasium as gym
import numpy as np
import pytest

from tests.envs.conftest import ID, MINI, SMALL, STEP_INFO


def test_reset_and_step_infos_have_the_same_keys_and_shapes():
    env = gym.make(ID, **SMALL)
    _, reset_info = env.reset(seed=0)
    *_, step_info = env.step(env.action_space.sample())
    assert set(reset_info) == set(step_info) == STEP_INFO
    for key in STEP_INFO:
        assert type(reset_info[key]) is type(step_info[key])
        assert np.shape(reset_info[key]) == np.shape(step_info[key])
    assert reset_info["instance"] == step_info["instance"]
    assert not any(np.any(reset_info[key]) for key in STEP_INFO - {"instance", "difficulty"})


@pytest.mark.parametrize("options", [5, ["split"], "split"])
def test_reset_options_are_a_dictionary(options):
    for env in (gym.make(MINI[0], **SMALL).unwrapped, gym.make_vec(MINI[0], num_envs=2, **SMALL)):
        with pytest.raises(TypeError, match="reset options: expected a dictionary"):
            env.reset(options=options)


def test_bad_reset_options():
    env = gym.make(MINI[0], **SMALL).unwrapped
    for options in ({"spit": "test"}, {"spit": "test", 1: 2, "split": "test"}):
        with pytest.raises(ValueError, match=r"unknown reset option .*; expected 'split' or 'instance'"):
            env.reset(options=options)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        env.reset(options={"split": "dev"})
    with pytest.raises(ValueError, match="no instance 'test-999' in the test split"):
        env.reset(options={"split": "test", "instance": "test-999"})


@pytest.mark.parametrize("instance", [3, None, [3], [["train-0"]]])
def test_instances_are_chosen_by_ids(instance):
    for env in (gym.make(MINI[0], **SMALL).unwrapped, gym.make_vec(MINI[0], num_envs=1, **SMALL)):
        with pytest.raises(TypeError, match="reset option 'instance': expected an id, or a list with one per env"):
            env.reset(options={"instance": instance})


def test_a_seed_that_is_no_integer_is_an_error_of_gymnasium():
    env = gym.make_vec(MINI[0], num_envs=2, **SMALL)
    with pytest.raises(gym.error.Error, match="Seed must be a python integer"):
        env.reset(seed=1.5)
