"""Which operating point of a run is kept."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents import make_agent
from sd_gym.agents.experiment.selection import PASSES, Selection
from sd_gym.agents.learning.decisions import DENSE_MARGIN, Version, observed, outcomes, versions
from sd_gym.agents.runs.verdict import Verdict

from sd_gym.config import RewardConfig
from sd_gym.policy import DecisionPolicy

CUSTOM = "SD/Classification-Custom-v0"


class Scripted:
    """Stands for a policy: answers lost of 2,000 policy rows and of 2,000 selection rows, and its FLOPs."""

    def __init__(self, flops, policy_rows, selection_rows):
        self.flops, self.lost = flops, {"train": policy_rows, "validation": selection_rows}

    def decide_split(self, split, rows):
        raise AssertionError


@pytest.fixture
def scripted_scores(env, monkeypatch):
    """Scripted policies are scored as they say; a list of what was scored, and a core whose epsilon is a point."""
    asked = []

    def score(core, policy, split, rows=None):
        asked.append((split.name, policy.flops))
        lost = policy.lost[split.name]
        flops = np.full(2000, policy.flops)
        quality = np.r_[np.zeros(lost), np.ones(2000 - lost)]
        ratios = {"flops_ratio": flops, "flops_ratio_with_policy": flops}
        return {"quality": quality, "quality_ref": np.ones(2000), **ratios}

    monkeypatch.setattr("sd_gym.agents.experiment.selection.outcomes", score)
    monkeypatch.setattr(env.core, "config", env.core.config.model_copy(update={"reward": RewardConfig(epsilon=0.01)}))
    return env.core, asked


def test_points_are_tested_from_dense_to_bold_until_one_fails(scripted_scores):
    core, asked = scripted_scores
    points = [Scripted(0.3, 9, 0), Scripted(0.8, 1, 5), Scripted(0.6, 4, 11), Scripted(0.45, 6, 13)]
    selection = Selection(core)
    chosen = selection.select([Version(point) for point in points])
    assert [flops for split, flops in asked if split == "validation"] == [0.8, 0.6, 0.45]
    assert chosen.policy is points[2]  # of 2,000 rows 11 may be lost; what comes after a failure is not looked at
    assert [(round(result.flops_ratio, 2), result.passed) for _, result in selection.tested] == [
        (0.8, True),
        (0.6, True),
        (0.45, False),
    ]
    assert all((result.highest_loss < 0.01) == result.passed for _, result in selection.tested)
    assert selection.report()["selection"]["points"][0]["loss"] == 5 / 2000
    assert selection.as_searched().policy is points[0]


def test_where_nothing_passes_it_is_dense(scripted_scores):
    selection = Selection(scripted_scores[0])
    assert selection.select([Version(Scripted(0.4, 0, 60))]) is None
    assert selection.margin == DENSE_MARGIN
    assert selection.report()["guarantee"].startswith(
        "dense: on 4 rows no operating point is shown to lose less than 1 point"
    )
    assert selection.select([]) is None
    assert selection.as_searched() is None


def test_the_confidence_is_that_of_the_tests(scripted_scores):
    points = [Version(Scripted(0.4, 0, 11))]
    assert Selection(scripted_scores[0], 0.95).select(points)
    assert Selection(scripted_scores[0], 0.99).select(points) is None
    for confidence in (0.4, 1.0):
        with pytest.raises(ValueError, match="expected a confidence of"):
            Selection(scripted_scores[0], confidence)


def test_bolder_versions_of_a_policy_that_loses_too_much_are_not_scored(scripted_scores):
    core, asked = scripted_scores
    origin, other = object(), Scripted(0.2, 3, 3)
    path = [Scripted(0.9, 5, 5), Scripted(0.8, 40, 40), Scripted(0.7, 41, 41)]
    Selection(core).select([*(Version(one, 0.0, origin) for one in path), Version(other)])
    assert {flops for split, flops in asked if split == "train"} == {0.9, 0.8, 0.2}


def test_a_version_that_by_chance_loses_more_than_epsilon_on_policy_rows_does_not_end_the_path(scripted_scores):
    """Of 2,000 rows 22 are lost where 20 may be: no standard error more, so what is bolder is estimated as well."""
    core, origin = scripted_scores[0], object()
    path = [Version(Scripted(*of), 0.0, origin) for of in ((0.9, 5, 1), (0.8, 22, 2), (0.7, 23, 3))]
    assert Selection(core).select(path) is path[2]


def test_without_a_test_the_choice_is_dense_where_only_what_saves_nothing_keeps_the_quality(scripted_scores):
    """Even dense itself, as a version, or what runs more than it."""
    selection = Selection(scripted_scores[0])
    selection.select([Version(Scripted(0.5, 60, 60)), Version(Scripted(1.0, 0, 0)), Version(Scripted(1.1, 0, 0))])
    assert selection.as_searched() is None


def test_without_labels_a_point_that_changes_answers_is_still_tested(scripted_scores, monkeypatch):
    core, origin = scripted_scores[0], object()
    data = core.config.data.model_copy(update={"policy_labels": "dense"})
    monkeypatch.setattr(core, "config", core.config.model_copy(update={"data": data}))
    path = [Version(Scripted(*of), 0.0, origin) for of in ((0.8, 40, 3), (0.7, 60, 5), (0.2, 400, 0), (0.1, 500, 0))]
    selection = Selection(core)
    assert selection.select(path) is path[2]
    assert [result.flops_ratio for _, result in selection.tested] == pytest.approx([0.8, 0.7, 0.2])


def test_variants_of_a_policy_do_not_oust_each_other(scripted_scores):
    """Where the bold one seems to lose less, on rows that it has learned on, the cautious one is still tested first."""
    points = [Version(Scripted(0.8, 5, 1), 0.0, object()), Version(Scripted(0.5, 0, 60), 0.0, object())]
    assert Selection(scripted_scores[0]).select(points) is None
    learned = object()
    variants = [point._replace(variant_of=learned) for point in points]
    assert Selection(scripted_scores[0]).select(variants) is variants[0]


def test_the_artefact_lists_what_was_tested_of_the_selected_policy(scripted_scores):
    """And nothing else: neither versions that nobody tested, nor other policies."""
    core, origin = scripted_scores[0], DecisionPolicy(3, [2, 1], ["encoder.0.attention"])
    path = [Version(Scripted(0.8, 1, 1), 3.0, origin), Version(Scripted(0.6, 2, 8), 1.0, origin)]
    bold = [Version(Scripted(0.4, 4, 30), 0.0, origin), Version(Scripted(0.3, 5, 900), -2.0, origin)]
    selection = Selection(core)
    assert selection.select([*path, *bold, Version(Scripted(0.95, 0, 0))]) is path[1]
    points = selection.operating_points()
    assert [(point.margin, point.passed) for point in points] == [
        (-1.0, False),
        (0.0, True),
        (2.0, True),
        (DENSE_MARGIN - 1.0, True),
    ]
    assert [point.loss for point in points] == [30 / 2000, 8 / 2000, 1 / 2000, 0.0]


def test_a_policy_that_was_tested_alone_is_listed_with_cautious_versions(env, monkeypatch):
    """So there is something to choose from for a stricter limit."""
    monkeypatch.setattr("sd_gym.agents.experiment.selection.verdict", lambda *_: Verdict.KEPT)
    policy, validation = make_agent("ppo", env).policy(), env.core.split("validation")
    selection = Selection(env.core)
    assert selection.select([Version(policy, origin=policy)]).policy is policy
    boldest, *cautious, dense = selection.operating_points()
    assert (boldest.margin, dense.margin, len(selection.tested)) == (0.0, DENSE_MARGIN, 1)
    assert 3 <= len(cautious) <= PASSES
    assert [point.margin for point in cautious] == sorted(point.margin for point in cautious)
    for point in (boldest, *cautious):
        ran = outcomes(env.core, policy.with_margin(point.margin), validation)["flops_ratio"]
        assert point.flops_ratio == ran.mean()


def test_versions_of_a_policy_go_from_dense_to_bold(env):
    policy, split = make_agent("ppo", env).policy(), env.core.split("train")
    offered = versions(env.core, policy)
    assert {one.origin for one in offered} == {policy}
    flops = [outcomes(env.core, one.policy, split)["flops_ratio"].mean() for one in offered]
    assert flops[0] == 1
    assert (np.diff(flops) <= 0).all()
    assert flops[-1] < 0.5
    learned = next(one.policy for one in offered if one.margin == 0)
    rows = np.arange(len(split))
    np.testing.assert_array_equal(
        outcomes(env.core, learned, split, rows)["decision"], outcomes(env.core, policy, split, rows)["decision"]
    )
    seen = env.core.observe(split, rows)
    shares = [one.policy.decide(seen).any(axis=1).mean() for one in versions(env.core, policy.reduced(2, seen))]
    assert len(set(shares)) > 10  # evenly from dense to its mask, whatever the scale of its logits
    assert (np.diff(shares) >= 0).all()
    assert [one.margin for one in versions(env.core, policy.reduced(1, seen))] == [0.0]


@pytest.mark.parametrize("judges", [False, True])
def test_inputs_with_the_same_preference_are_not_decided_by_rounding(env, judges):
    """As answers of a mask that skips everything: they are accepted, but a sublayer runs."""
    env = gym.make_vec("SD/Classification-TREC-Staged-Table-v0", num_envs=4).unwrapped if judges else env
    policy, split = make_agent("ppo", env).policy(), env.core.split("train")
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.linspace(-2, 2, len(policy.head.bias)))
    others = [version.policy for version in versions(env.core, policy) if version.margin != 0]
    assert others
    for other in others:
        preferred = other.preference(observed(env.core, other, split, np.arange(20))[-1])
        nearest = preferred.ravel()[np.abs(preferred).argmin()]
        assert nearest > 5e-5 if judges else nearest < -5e-5


def test_the_validation_reward_is_the_objectives(custom):
    env = gym.make_vec(CUSTOM, num_envs=4, penalty=2.0, **custom).unwrapped
    policy = make_agent("random", env, rate=0.9).policy()
    entry = Selection(env.core).validate(100, policy, env.objective)
    assert entry["quality"] != entry["quality_ref"]
    saved = 1 - entry["flops_ratio"]
    scored = outcomes(env.core, policy, env.core.split("validation"))
    lost = (scored["quality_ref"] - scored["quality"]).mean()
    assert entry["reward"] == pytest.approx(saved - 2.0 * lost)
