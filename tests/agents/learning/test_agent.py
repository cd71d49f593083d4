"""Agents: they learn what is easy to learn, and are deterministic."""

import warnings
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents import make_agent
from sd_gym.agents.learning.agent import decision_logits, learning_bias
from stable_baselines3.common.logger import Logger

import sd_gym
from sd_gym.envs.protocols import Outcome
from tests.agents.conftest import LEARNING, Points, learn

CUSTOM = "SD/Classification-Custom-v0"


@pytest.mark.parametrize("name", LEARNING)
def test_learns_to_skip_everything_where_quality_is_free(name, env, tmp_path):
    # A multiplier pays for quality to spare until it has fallen to nothing.
    settings = {"multiplier_rate": 0.1} if name.endswith("_lagrangian") else {}
    rate = 0.01 if name == "a2c" else 4e-3  # it takes one step a rollout, and rows as few as these have noise
    agent = make_agent(name, env, seed=0, initial_skip_rate=0.3, learning_rate=rate, **settings)
    rollouts = learn(agent, {"reinforce": 1_000}.get(name, 5_000), tmp_path)
    assert rollouts[0].infos["flops_ratio"].mean() > 0.6
    decisions = agent.policy().decide(env.core.observe(env.core.split("train"), np.arange(32)))
    assert decisions[:, :-1].mean() > 0.8  # a few inputs may be left behind


@pytest.mark.parametrize("name", LEARNING)
def test_learns_to_look_at_its_input(name, make_env, tmp_path, monkeypatch):
    """Skipping the first switch is right for one half of the instances and wrong for the other."""
    env = make_env(epsilon=0.0)
    core = env.core
    positive = core.split("train").encoded.labels.numpy().astype(bool)

    def score(split, rows, decisions, resume_from=None):
        right = (decisions[:, 0] == positive[rows]).astype(float)
        return Outcome(right, np.ones(len(rows)), np.full(len(rows), 0.5))

    monkeypatch.setattr(core, "score", score)
    accuracy = {}
    settings, steps = {"learning_rate": 0.01}, 4_000
    if name == "reinforce":  # of 32 instances no more need be imagined
        settings, steps = {"learning_rate": 0.005, "imagined": 32, "fit_batch": 64}, 5_000
    for variant in (name, f"blind-{name}"):
        agent = make_agent(variant, env, seed=0, **settings)
        learn(agent, steps if variant == name else steps // 4, tmp_path)  # who sees nothing learns nothing
        decisions = agent.policy().decide(core.observe(core.split("train"), np.arange(32)))
        accuracy[variant] = (decisions[:, 0] == positive).mean()
    assert accuracy[name] > 0.9
    assert accuracy[f"blind-{name}"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", LEARNING)
def test_same_seed_same_policy(name, env, tmp_path):
    weights = []
    for seed in (0, 0, 1):
        env.reset(seed=seed)
        agent = make_agent(name, env, seed=seed)
        learn(agent, 500, tmp_path)
        weights.append(agent.policy().head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_logits_of_dense_give_the_skip_rate():
    bias = decision_logits(np.array([2, 2, 1]), np.zeros(3), 0.9)
    assert bias.shape == (5,)
    assert bias[:2].softmax(0)[1].item() == pytest.approx(0.1)


def test_learning_begins_at_even_odds_of_switches_and_keeps_most_tokens(custom, tmp_path):
    core = gym.make_vec(CUSTOM, num_envs=1, **custom, token_shares=[0.0, 0.5]).unwrapped.core
    bias = learning_bias(core, 0.5).view(-1, 2).softmax(1)[:, 1]
    assert bias[:-1].tolist() == [0.5] * core.n_switches
    assert bias[-1].item() == pytest.approx(0.1)
    assert learning_bias(core, 0.05).view(-1, 2).softmax(1)[-1, 1].item() == pytest.approx(0.05)
    sd_gym.tabulate(CUSTOM, tmp_path / "table", decisions="random:4", **custom)
    table = gym.make_vec("SD/Table-v0", num_envs=1, table=str(tmp_path / "table")).unwrapped.core
    assert learning_bias(table, 0.5).tolist() == [0.0] * 4  # indices of masks, none of them a token level


def test_a_margin_makes_a_policy_skip_less_and_less(env):
    policy = make_agent("random", env, rate=0.4).policy()
    observations = env.core.observe(env.core.split("train"), np.arange(32))
    skipped = [policy.with_margin(margin).decide(observations)[:, :-1] for margin in (0.0, 1.0, 2.0, 9.0)]
    np.testing.assert_array_equal(skipped[0], policy.decide(observations)[:, :-1])
    for bolder, shyer in pairwise(skipped):
        assert (shyer <= bolder).all()
        assert shyer.sum() < bolder.sum()


@pytest.mark.parametrize("name", ["ppo", "ppo_lex", "a2c", "reinforce"])
def test_tags_of_a_rollout_are_means_over_all_its_decisions(name, custom):
    env = gym.make_vec(CUSTOM, num_envs=32, epsilon=0.0, **custom).unwrapped
    env.reset(seed=0)
    agent = make_agent(name, env, initial_skip_rate=0.5)
    kept, rollouts = Points(), {}
    agent.learn(3_000, Logger(None, [kept]), lambda rollout: rollouts.update({rollout.steps: rollout}))
    points = {step: values for step, values in kept.points if "rollout/ep_rew_mean" in values}
    assert 40 <= len(points) <= 100  # of all agents, however large their rollouts
    for step, values in points.items():
        rollout = rollouts[step]
        assert values["rollout/ep_rew_mean"] == pytest.approx(rollout.rewards.mean(), rel=1e-5)
        assert values["rollout/success_rate"] == pytest.approx(rollout.infos["is_success"].mean())
        assert values["rollout/ep_len_mean"] == 1
        for key in ("quality", "quality_ref", "flops_ratio"):
            assert values[f"rollout/{key}"] == pytest.approx(rollout.infos[key].mean())
    assert len({float(values["rollout/success_rate"]) for values in points.values()} | {0.0, 1.0}) > 2


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_a_loss_of_epsilon_is_a_success_and_any_more_is_none(name, make_env, tmp_path, monkeypatch):
    """Whether the env says so or an agent that scores by itself."""
    env = make_env(epsilon=0.25)

    def score(split, rows, decisions, resume_from=None):
        lost = np.where(rows % 2, 0.25, 0.375)
        return Outcome(1 - lost, np.ones(len(rows)), np.full(len(rows), 0.5))

    monkeypatch.setattr(env.core, "score", score)
    infos = learn(make_agent(name, env, seed=0), 64, tmp_path)[0].infos
    assert 0 < infos["is_success"].mean() < 1
    np.testing.assert_array_equal(infos["is_success"], infos["quality_ref"] - infos["quality"] == 0.25)


@pytest.mark.parametrize("name", ["ppo", "a2c", "ppo_lagrangian", "ppo_lex", "reinforce", "imitation"])
def test_a_learner_that_does_not_see_the_reward_says_so(name):
    env = gym.make_vec("SD/Classification-TREC-Table-v1", num_envs=4, gains="ignored").unwrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_agent(name, env)
    told = [str(one.message) for one in caught if "does not learn from the env's reward" in str(one.message)]
    assert len(told) == (name not in ("ppo", "a2c"))
