"""Which of the policies of a run is kept."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.experiment.selection import MARGINS, Selection
from sd_gym.agents.learning.decisions import decide_and_score, halves

from sd_gym.config import RewardConfig
from sd_gym.objectives import Objective

CUSTOM = "SD/Classification-Custom-v0"


class Scripted:
    """Stands for a policy: its loss and FLOPs at each margin are given."""

    def __init__(self, losses, flops, margin=0.0):
        self.losses, self.flops, self.margin = losses, flops, margin

    def with_margin(self, margin):
        return Scripted(self.losses, self.flops, margin)


@pytest.fixture
def scripted_scores(env, monkeypatch):
    """Scripted policies are scored as they say, on halves of 2,000 instances."""

    def score(core, policy, split, rows):
        dense = policy.margin == MARGINS[-1]
        halves = (0, 1) if len(rows) == len(split) else (int(rows[0] > 0),)
        losses = [0 if dense else policy.losses(policy.margin)[half] for half in halves]
        quality = np.concatenate([np.r_[np.zeros(lost), np.ones(2000 - lost)] for lost in losses])
        ratio = 1.0 if dense else policy.flops(policy.margin)
        return {"quality": quality, "quality_ref": 0 * quality + 1, "flops_ratio": 0 * quality + ratio}

    monkeypatch.setattr("sd_gym.agents.experiment.selection.decide_and_score", score)
    monkeypatch.setattr("sd_gym.agents.experiment.selection.by_difficulty", lambda scored, levels: [])
    monkeypatch.setattr(Selection, "_least", lambda self, policy: policy.flops(MARGINS[0]))
    monkeypatch.setattr(env.core, "config", env.core.config.model_copy(update={"reward": RewardConfig(epsilon=0.01)}))
    return env.core


def test_selection_prefers_kept_quality_then_fewer_flops(scripted_scores):
    good = Scripted(lambda margin: (1, 1), lambda margin: 0.5)
    broken = Scripted(lambda margin: (100, 100), lambda margin: 0.2)
    worse = Scripted(lambda margin: (0, 0), lambda margin: 0.6)
    selection, policies = Selection(scripted_scores), (broken, good, worse)
    objective = Objective(scripted_scores.config.reward)
    entries = [selection.consider(step, policy, objective) for step, policy in enumerate(policies)]
    assert [entry["quality_kept"] for entry in entries] == [False, True, True]
    assert selection.select(policies).flops is good.flops


def test_what_cannot_be_the_cheapest_is_not_screened(scripted_scores):
    """Another one is cheaper than it at its boldest."""

    def fail(margin):
        raise AssertionError

    good, dear = Scripted(lambda margin: (1, 1), lambda margin: 0.5), Scripted(fail, lambda margin: 0.6)
    assert Selection(scripted_scores).select([dear, good]).flops is good.flops


def test_a_candidate_that_was_only_lucky_on_the_screening_half_is_not_confirmed(scripted_scores):
    lucky = Scripted(lambda margin: (0, 30), lambda margin: 0.2)
    honest = Scripted(lambda margin: (1, 1), lambda margin: 0.5)
    selection = Selection(scripted_scores, searched=True)
    assert selection.select([lucky, honest]).flops is honest.flops
    only = selection.select([lucky])
    assert only.margin == MARGINS[-1]  # nothing keeps the quality, so everything runs


def test_without_a_search_both_halves_are_one_sample(scripted_scores):
    """What is lost on one half by luck is not held against a policy twice."""
    uneven = Scripted(lambda margin: (12, 2) if margin < 1 else (0, 0), lambda margin: 0.3 + margin / 10)
    assert Selection(scripted_scores).select([uneven]).margin == MARGINS[0]
    assert Selection(scripted_scores, searched=True).select([uneven]).margin == 1.0


def test_a_policy_that_loses_too_much_is_made_more_cautious(scripted_scores):
    bold = Scripted(lambda margin: (20, 20) if margin < 0.5 else (0, 0), lambda margin: 0.3 + margin / 10)
    assert Selection(scripted_scores).select([bold]).margin == 0.5


def test_the_validation_reward_is_the_objectives(custom):
    env = gym.make_vec(CUSTOM, num_envs=4, penalty=2.0, **custom).unwrapped
    policy = make_agent("random", env, rate=0.9).policy()
    entry = Selection(env.core).consider(100, policy, env.objective)
    assert entry["quality"] != entry["quality_ref"]
    saved = 1 - entry["flops_ratio"]
    scored = decide_and_score(env.core, policy, env.core.split("validation"), halves(env.core.split("validation"))[0])
    lost = (scored["quality_ref"] - scored["quality"]).mean()
    assert entry["reward"] == pytest.approx(saved - 2.0 * lost)
