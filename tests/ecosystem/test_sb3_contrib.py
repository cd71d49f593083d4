"""sb3-contrib: its maskable PPO asks the env which actions are allowed."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import sd_gym
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


@pytest.mark.parametrize("name", ["MaskablePPO", "RecurrentPPO"])
def test_evaluating_in_stages_gives_the_model_what_its_own_evaluation_does(name):
    """What a stage allows, and the state of the stage before."""
    from sd_gym.envs.sb3 import SwitchableVecEnv

    staged = "SD/Classification-TREC-Staged-Table-v0"  # its stages have 7, 7 and 2 choices
    env = SwitchableVecEnv(gym.make_vec(staged, num_envs=4))
    policy = {"MaskablePPO": "MlpPolicy", "RecurrentPPO": "MlpLstmPolicy"}[name]
    model = getattr(sb3_contrib, name)(policy, env, **{**QUICK, "seed": 1})
    with torch.no_grad():
        model.policy.action_net.weight.normal_(std=3)  # decisions that differ, and would take what is forbidden
    result = sd_gym.evaluate(staged, model)
    single, flops = gym.make(staged, split="test").unwrapped, []
    for instance in single.core.split("test").ids.tolist():
        observation, _ = single.reset(options={"instance": instance})
        state, done = None, False
        while not done:
            start = np.array([state is None])
            own = {"action_masks": single.action_masks()} if name == "MaskablePPO" else {}
            own |= {} if name == "MaskablePPO" else {"state": state, "episode_start": start}
            action, state = model.predict(observation, deterministic=True, **own)
            observation, _, done, _, info = single.step(action)
        flops.append(info["flops_ratio"])
    assert result["flops_ratio"] == pytest.approx(np.mean(flops))
