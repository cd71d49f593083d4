"""REINFORCE: when it begins to learn, and what its barrier judges by."""

import numpy as np
import pytest
import torch
from sd_gym.agents.registry import make_agent
from stable_baselines3.common.logger import Logger, configure

from sd_gym.envs.protocols import Outcome
from tests.agents.conftest import Points, learn


def test_reinforce_waits_for_its_foresight_but_learns_in_short_runs_too(staged_env, tmp_path):
    agent = make_agent("reinforce", staged_env, seed=0)
    first, moved = agent.policy().head.bias, []

    def on_rollout(rollout):
        moved.append(not torch.equal(agent.policy().head.bias, first))

    agent.learn(256, configure(str(tmp_path), []), on_rollout)  # rollouts of 32 decisions; it waits for a quarter
    assert moved == [False] * 2 + [True] * 6


def test_the_foresight_learns_shares_of_what_an_instance_can_lose(env, monkeypatch):
    agent = make_agent("reinforce", env, seed=0)
    monkeypatch.setattr(type(agent._split.scoring), "highest", 4.0)

    def score(split, rows, decisions, resume_from=None):
        return Outcome(np.zeros(len(rows)), np.full(len(rows), 3.0), np.full(len(rows), 0.5))

    monkeypatch.setattr(env.core, "score", score)
    agent._explore()
    assert agent.foresight.lost.unique().tolist() == [0.75]
    monkeypatch.setattr(agent.foresight, "loss", lambda seen, decisions: torch.full((len(decisions),), 0.75))
    assert agent._imagine(agent.foresight).loss.unique().tolist() == [3.0]


@pytest.mark.parametrize("foresight", [True, False])
def test_an_entropy_is_that_of_all_stages(staged_env, tmp_path, foresight):
    points = Points()
    agent = make_agent("reinforce", staged_env, seed=0, foresight=foresight, num_envs=256, initial_skip_rate=0.5)
    agent.learn(512, Logger(None, [points]), lambda rollout: None)
    (_, first), *_ = [point for point in points.points if "train/entropy_loss" in point[1]]
    core = staged_env.core
    assert first["train/entropy_loss"] == pytest.approx(-core.n_switches * np.log(2), rel=0.1)


def weighings(agent, score, steps, folder, monkeypatch):
    """Learn on other scores; returns the loss and the gradients that each update gave to the barrier."""
    given, weigh = [], agent.barrier.weigh
    monkeypatch.setattr(agent.env.core, "score", score)
    monkeypatch.setattr(agent.barrier, "weigh", lambda *update: (given.append(update), weigh(*update))[1])
    agent.learn(steps, configure(str(folder), []), lambda rollout: None)
    return given


def test_gained_answers_make_up_for_lost_ones_in_the_barrier(env, tmp_path, monkeypatch):
    """Of four answers one is half lost and two are half gained."""

    def score(split, rows, decisions, resume_from=None):
        lost = np.resize([1.0, -1.0, -1.0, 0.0], len(rows))
        return Outcome((1 - lost) / 2, np.full(len(rows), 0.5), np.full(len(rows), 0.5))

    agent = make_agent("reinforce", env, seed=0)
    updates = weighings(agent, score, 64, tmp_path, monkeypatch)
    assert {lost for lost, *_ in updates} == {-1 / 8}
    assert agent.foresight.lost.min() < 0


def test_the_barrier_gets_gradients_of_different_instances(env, tmp_path, monkeypatch):
    """Noise has mean zero only in a product of independent estimates: here one half has losses, the other has none."""

    def score(split, rows, decisions, resume_from=None):
        instance = np.arange(len(rows)) % env.num_envs  # each is scored several times
        lost = np.where(instance < env.num_envs // 2, decisions[:, 0], 0)
        return Outcome(1.0 - lost, np.ones(len(rows)), 1 - decisions[:, :-1].mean(axis=1))

    agent = make_agent("reinforce", env, seed=0, foresight=False, initial_skip_rate=0.5)
    _, of_flops, of_loss = weighings(agent, score, 32, tmp_path, monkeypatch)[0]
    assert of_loss[0].norm() > 0
    assert of_loss[1].norm() == 0
    assert all(half.norm() > 0 for half in of_flops)
    assert not torch.equal(*of_flops)


def test_the_entropy_bonus_moves_decisions_towards_even_odds(env, tmp_path, monkeypatch):
    """All decisions lose and cost the same, so nothing else moves them."""

    def score(split, rows, decisions, resume_from=None):
        return Outcome(np.ones(len(rows)), np.ones(len(rows)), np.full(len(rows), 0.5))

    monkeypatch.setattr(env.core, "score", score)
    settings = {"foresight": False, "initial_skip_rate": 0.2, "entropy": 0.1, "learning_rate": 0.01}
    agent = make_agent("reinforce", env, seed=0, **settings)
    learn(agent, 2_000, tmp_path)
    policy = agent.policy()
    with torch.no_grad():
        logits = policy(torch.from_numpy(env.core.observe(env.core.split("train"), np.arange(32))))
    skip_rates = logits[:, : 2 * env.core.n_switches].view(32, -1, 2).softmax(2)[..., 1].mean(dim=0)
    np.testing.assert_allclose(skip_rates, 0.5, atol=0.1)
