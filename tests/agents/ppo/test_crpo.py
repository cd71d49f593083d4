"""PPO with quality first: what it learns from, and the limit by which it tells."""

import numpy as np
from sd_gym.agents import make_agent
from stable_baselines3 import PPO

from sd_gym.envs.protocols import Outcome
from tests.agents.conftest import learn

LOST = 0.05  # of every instance, whatever is skipped


def learned_from(monkeypatch, make_env, folder, steps, **settings):
    """Of each update: savings, losses, predicted savings, and the advantages that the library got."""
    env, updates = make_env(epsilon=0.1), []

    def score(split, rows, decisions, resume_from=None):
        return Outcome(np.full(len(rows), 1 - LOST), np.ones(len(rows)), 1 - 0.9 * decisions[:, :-1].mean(axis=1))

    def train(algorithm):
        buffer = algorithm.rollout_buffer
        updates.append((algorithm.savings, algorithm.losses, buffer.values.copy(), buffer.advantages.copy()))
        original(algorithm)

    original = PPO.train
    monkeypatch.setattr(env.core, "score", score)
    monkeypatch.setattr(PPO, "train", train)
    learn(make_agent("ppo_lex", env, seed=0, initial_skip_rate=0.5, **settings), steps, folder)
    return updates


def is_of_savings(savings, losses, predicted, advantages):
    return np.allclose(advantages, savings - predicted, atol=1e-6)


def test_while_the_quality_is_kept_an_advantage_is_what_is_saved_beyond_what_was_predicted(
    make_env, tmp_path, monkeypatch
):
    updates = learned_from(monkeypatch, make_env, tmp_path, 640, limit=50.0)
    assert len(updates) == 10
    assert all(is_of_savings(*update) for update in updates)
    assert all(np.abs(predicted).max() > 1e-3 for _, _, predicted, _ in updates)


def test_the_loss_that_sampled_decisions_may_have_falls_linearly_to_nothing(make_env, tmp_path, monkeypatch):
    """All lose half an epsilon. The limit begins at one epsilon, and passes that at half of the run."""
    updates = learned_from(monkeypatch, make_env, tmp_path, 640, limit=1.0)
    kept = [is_of_savings(*update) for update in updates]
    assert len(kept) == 10
    assert 4 <= sum(kept) <= 5
    assert kept == sorted(kept, reverse=True)  # first from the savings, then from the quality alone
