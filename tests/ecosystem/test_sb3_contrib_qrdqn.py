"""QR-DQN of sb3-contrib, which chooses one of a codebook's masks; and MaskablePPO on the other action spaces."""

import gymnasium as gym
import numpy as np
import pytest

import sd_gym  # noqa: F401  (registers the ids)
from sd_gym.envs.sb3 import SwitchableVecEnv

PINS = ["sb3-contrib==2.9.2"]
sb3_contrib = pytest.importorskip("sb3_contrib")


def test_qr_dqn_learns_on_masks():
    env = gym.make_vec("SD/Classification-Mini-v0", num_envs=8, train_size=60, action="discrete").unwrapped
    vec_env = SwitchableVecEnv(env)
    agent = sb3_contrib.QRDQN("MlpPolicy", vec_env, learning_starts=100, train_freq=1, gamma=0.0, seed=0)
    agent.learn(1000)
    split, rows = env.core.split("train"), np.arange(60)
    chosen, _ = agent.predict(env.core.observe(split, rows), deterministic=True)
    outcome = env.core.score(split, rows, env.core.actions.decisions(chosen, 60))
    random = env.core.actions.decisions(np.random.default_rng(0).integers(env.single_action_space.n, size=60), 60)
    assert outcome.quality.mean() > 0.9
    assert outcome.quality.mean() > env.core.score(split, rows, random).quality.mean()
    assert outcome.flops_ratio.mean() < 0.9


@pytest.mark.parametrize("action", ["multi_binary", "discrete"])
def test_maskable_ppo_has_a_mask_for_each_choice(action):
    env = gym.make_vec("SD/Classification-Mini-v0", num_envs=4, train_size=60, action=action).unwrapped
    agent = sb3_contrib.MaskablePPO("MlpPolicy", SwitchableVecEnv(env), n_steps=8, batch_size=32, seed=0)
    agent.learn(64)
    observations = env.core.observe(env.core.split("train"), np.arange(4))
    only_dense = env.action_masks()
    if action == "multi_binary":
        only_dense[:, 1::2] = False
    else:
        only_dense[:, 1:] = False
    chosen, _ = agent.predict(observations, action_masks=only_dense)
    assert not env.core.actions.decisions(chosen, 4).any()
