"""sb3-contrib: its maskable PPO asks the env which actions are allowed."""

import gymnasium as gym
import numpy as np
import pytest

import sd_gym  # noqa: F401  (registers the ids)
from tests.ecosystem import ID, SMALL

PINS = ["sb3-contrib==2.9.2"]
sb3_contrib = pytest.importorskip("sb3_contrib")

QUICK = {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "seed": 0}


def test_maskable_ppo_learns_on_the_vector_env_and_on_a_single_one():
    from sd_gym.envs.sb3 import SwitchableVecEnv

    for env in (SwitchableVecEnv(gym.make_vec(ID, num_envs=4, **SMALL)), gym.make(ID, **SMALL)):
        model = sb3_contrib.MaskablePPO("MlpPolicy", env, **QUICK)
        before = model.policy.action_net.weight.detach().clone()
        model.learn(64)
        assert not (model.policy.action_net.weight == before).all()


def test_a_mask_that_forbids_every_skip_gives_dense_decisions(monkeypatch):
    from sd_gym.envs.sb3 import SwitchableVecEnv

    vector = gym.make_vec(ID, num_envs=4, **SMALL).unwrapped
    dense = np.concatenate([[choice == 0 for choice in range(n)] for n in vector.single_action_space.nvec])
    monkeypatch.setattr(vector, "action_masks", lambda: np.stack([dense] * 4))
    env = SwitchableVecEnv(vector)
    model = sb3_contrib.MaskablePPO("MlpPolicy", env, **QUICK)
    model.learn(32)
    assert not model.rollout_buffer.actions.any()
    assert np.allclose(model.rollout_buffer.rewards, 0)  # dense: nothing saved, nothing lost


def test_its_other_algorithms_learn():
    from sd_gym.envs.sb3 import SwitchableVecEnv

    env = SwitchableVecEnv(gym.make_vec(ID, num_envs=4, **SMALL))
    sb3_contrib.TRPO("MlpPolicy", env, n_steps=8, batch_size=16, seed=0).learn(32)
    sb3_contrib.RecurrentPPO("MlpLstmPolicy", env, **QUICK).learn(32)
