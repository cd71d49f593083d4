"""Agents of Stable-Baselines3: what leaves is what the library has learned."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sd_gym.agents.registry import make_agent
from stable_baselines3 import A2C, PPO

from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.policy import DecisionPolicy
from tests.agents.conftest import SB3, learn

CUSTOM = "SD/Classification-Custom-v0"


@pytest.mark.parametrize("name", [*SB3, "blind-ppo"])
def test_the_exported_policy_decides_as_sb3_does(name, env, tmp_path):
    agent = make_agent(name, env, seed=0, learning_rate=0.01)
    learn(agent, 3_000, tmp_path)
    agent.save_extra(tmp_path)
    agent.policy().save(tmp_path)
    observations = np.random.default_rng(0).normal(size=(200, *env.single_observation_space.shape)).astype(np.float32)
    loaded = make_agent(name, env, seed=1).algorithm
    loaded.policy.load_state_dict(load_file(tmp_path / "sb3.safetensors"))
    seen = np.zeros_like(observations) if name.startswith("blind") else observations
    expected, _ = loaded.predict(seen, deterministic=True)
    np.testing.assert_array_equal(DecisionPolicy.load(tmp_path).decide(observations), expected)


@pytest.mark.parametrize(("name", "library"), [("ppo", PPO), ("a2c", A2C)])
def test_the_librarys_own_model_takes_the_parameters(name, library, finished, custom):
    """As docs/libraries.md says; the critic's are among them, and no code is run to read them."""
    folder, _, _ = finished(name)
    env = SwitchableVecEnv(gym.make_vec(CUSTOM, num_envs=4, **custom).unwrapped)
    model = library("MlpPolicy", env, n_steps=4)
    parameters = load_file(folder / "sb3.safetensors")
    model.policy.load_state_dict(parameters)
    assert torch.equal(model.policy.value_net.weight, parameters["value_net.weight"])
    observations = env.reset()
    before = model.predict(observations, deterministic=True)[0]
    assert before.shape == (4, *env.action_space.shape)
    model.learn(16)  # and learning goes on from there


def test_only_what_a_stage_decides_is_drawn_and_counts(staged_env):
    core, policy = staged_env.core, make_agent("ppo", staged_env, seed=0).algorithm.policy
    width = staged_env.single_observation_space.shape[0]
    for stage, columns in enumerate(core.columns):
        observations = torch.zeros(64, width)
        observations[:, stage] = 1
        actions, _, log_prob = policy(observations)
        own = columns.stop - columns.start
        assert (actions[:, own:] == 0).all()
        assert actions[:, :own].float().mean() == pytest.approx(0.5, abs=0.1)
        _, again, entropy = policy.evaluate_actions(observations, actions)
        np.testing.assert_allclose(again.detach(), np.log(0.5) * own, rtol=0.05)
        np.testing.assert_allclose(entropy.detach(), -np.log(0.5) * own, rtol=0.05)
        assert torch.equal(again, log_prob)
