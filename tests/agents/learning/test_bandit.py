"""A bandit with a known Pareto set: constrained agents end at the cheapest arm that keeps the quality.

Two switches matter; what each of the four arms loses and costs is given by hand. Epsilon is 0.01:

| skips | quality lost | FLOPs | |
| --- | --- | --- | --- |
| none | 0 | 1.0 | |
| the first | 0.004 | 0.6 | the cheapest that keeps the quality |
| the second | 0.05 | 0.3 | |
| both | 0.2 | 0.1 | |
"""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from stable_baselines3.common.logger import configure

from sd_gym.envs.protocols import Outcome

LOST = np.array([[0.0, 0.05], [0.004, 0.2]])
FLOPS = np.array([[1.0, 0.3], [0.6, 0.1]])
CONSTRAINED = {
    "ppo_lagrangian": {"multiplier_rate": 1.0, "n_steps": 4},
    "ppo_lex": {"entropy": 0.0, "n_steps": 4},  # what the bonus has it draw at random counts as quality lost
    "reinforce": {},
}
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


def score(split, rows, decisions, resume_from=None):
    lost, ratio = LOST[decisions[:, 0], decisions[:, 1]], FLOPS[decisions[:, 0], decisions[:, 1]]
    reference = np.ones(len(rows))
    return Outcome(1 - lost, reference, ratio)


def end(name, seed, folder, reviews, backbone, monkeypatch, **settings):
    """The arm that an agent has learned, after a short budget."""
    env_keys = {key: settings.pop(key) for key in ("penalty",) if key in settings}
    files = {"dataset": str(reviews), "backbone": str(backbone)}
    env = gym.make_vec("SD/Classification-Custom-v0", num_envs=32, **files, **env_keys).unwrapped
    monkeypatch.setattr(env.core, "score", score)
    env.reset(seed=seed)
    agent = make_agent(name, env, seed=seed, learning_rate=3e-3, initial_skip_rate=0.3, **settings)
    agent.learn(8_000 if name == "reinforce" else 12_000, configure(str(folder), []), lambda rollout: None)
    decisions = agent.policy().decide(env.core.observe(env.core.split("train"), np.arange(32)))[:, :2]
    arms, counts = np.unique(decisions, axis=0, return_counts=True)
    return tuple(arms[counts.argmax()].tolist())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CONSTRAINED)
def test_constrained_agents_end_at_the_cheapest_arm_that_keeps_the_quality(
    name, seed, tmp_path, reviews, tiny_backbone, monkeypatch
):
    assert end(name, seed, tmp_path, reviews, tiny_backbone, monkeypatch, **CONSTRAINED[name]) == (1, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fixed_penalty_that_is_too_low_does_not(seed, tmp_path, reviews, tiny_backbone, monkeypatch):
    """By hand: skipping the second switch is worth 0.7 - 3 * 0.05 = 0.55, the right arm 0.4 - 3 * 0.004 = 0.388."""
    settings = {"penalty": 3.0, "n_steps": 4}
    assert end("ppo", seed, tmp_path, reviews, tiny_backbone, monkeypatch, **settings) == (0, 1)
