"""The window of an env."""

import copy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.env_checker import check_env

from sd_gym.envs import pygame_window
from sd_gym.envs.single import SwitchableEnv
from sd_gym.envs.vector import SwitchableVectorEnv
from tests.envs.conftest import SMALL, action_for

SUMMARIZATION = "SD/Summarization-Mini-v0"


def test_a_window_opens_and_closes(monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setitem(SwitchableEnv.metadata, "render_fps", 1000)
    env = gym.make(SUMMARIZATION, render_mode="human", **SMALL)
    picture = gym.make(SUMMARIZATION, render_mode="rgb_array", **SMALL)
    for one in (env, picture):
        one.reset(seed=0)
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    np.testing.assert_array_equal(shown, picture.render())
    for one in (env, picture):
        one.step(action_for(env, [2]))
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    np.testing.assert_array_equal(shown, picture.render())
    assert env.render() is None
    copy.deepcopy(env.unwrapped._window).close()  # one of its own
    assert pygame.display.get_init()
    env.close()
    assert not pygame.display.get_init()
    env.close()
    check_env(env.unwrapped)


def test_without_pygame_there_is_no_window_and_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pygame_window, "HAS_PYGAME", False)
    with pytest.raises(DependencyNotInstalled, match="run `pip install pygame`"):
        SwitchableEnv("summarization_mini.yaml", render_mode="human", **SMALL)
    with pytest.raises(ValueError, match="render_mode must be one of ansi, rgb_array or None, got 'human'"):
        SwitchableVectorEnv("summarization_mini.yaml", render_mode="human", **SMALL)
