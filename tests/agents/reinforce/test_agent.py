"""REINFORCE: when it begins to learn, and what its barrier judges by."""

import numpy as np
import torch
from sd_gym.agents.registry import make_agent
from stable_baselines3.common.logger import configure

from sd_gym.envs.protocols import Outcome


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

    def score(split, rows, decisions, seen=None):
        return Outcome(np.zeros(len(rows)), np.full(len(rows), 3.0), np.full(len(rows), 0.5))

    monkeypatch.setattr(env.core, "score", score)
    agent._explore()
    assert agent.foresight.lost.unique().tolist() == [0.75]
    monkeypatch.setattr(agent.foresight, "loss", lambda seen, decisions: torch.full((len(decisions),), 0.75))
    assert agent._imagine(agent.foresight).loss.unique().tolist() == [3.0]


def test_gained_answers_make_up_for_lost_ones_in_the_barrier(env, tmp_path, monkeypatch):
    """Of four answers one is half lost and two are half gained."""
    agent, violated = make_agent("reinforce", env, seed=0), []

    def score(split, rows, decisions, seen=None):
        lost = np.resize([1.0, -1.0, -1.0, 0.0], len(rows))
        return Outcome((1 - lost) / 2, np.full(len(rows), 0.5), np.full(len(rows), 0.5))

    def weigh(lost, *gradients):
        violated.append(lost)
        return weighed(lost, *gradients)

    weighed = agent.barrier.weigh
    monkeypatch.setattr(env.core, "score", score)
    monkeypatch.setattr(agent.barrier, "weigh", weigh)
    agent.learn(64, configure(str(tmp_path), []), lambda rollout: None)
    assert {*violated} == {-1 / 8}
    assert agent.foresight.lost.min() < 0
