"""Whoever is sure leaves."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.baselines import early_exit
from sd_gym.agents.baselines.early_exit import Exit
from sd_gym.agents.experiment.run import train


def test_early_exit_leaves_at_the_first_sure_layer(env):
    agent = make_agent("early-exit", env)
    split = env.core.split("train")
    rows = np.arange(len(split))
    confidence = agent.confidence(split, rows)
    assert confidence.shape == (len(split), 3)
    dense = split.passes.confidence(rows, np.zeros((len(split), len(env.core.nvec)), dtype=int))
    np.testing.assert_allclose(confidence[:, -1], dense)
    threshold = float(np.median(confidence[:, 0]))
    decided = Exit(agent, np.full(3, threshold)).decide_split(split, rows)
    sure = confidence[:, 0] >= threshold
    assert 0 < sure.sum() < len(split)
    np.testing.assert_array_equal(decided.decisions[sure], np.tile([0, 0, 1, 1, 1, 1, 0], (sure.sum(), 1)))
    assert not decided.decisions[~sure][:, :4].any()
    head = env.core.backbone.flops.costs(split.encoded.source_length)[0]
    assert (decided.flops[sure] == 0).all()
    assert (decided.flops[~sure] >= head[~sure]).all()


def test_early_exit_is_selected_as_policies_are(settings, tmp_path):
    result = train(
        "SD/Classification-Custom-v0", "early-exit", tmp_path / "run", steps=1, **{**settings, "epsilon": 0.3}
    )
    assert result["flops_ratio_with_policy"] == result["flops_ratio"] == 1  # four rows show nothing
    assert result["last_policy"]["flops_ratio"] < 1
    assert result["guarantee"].startswith("dense: on 4 rows no operating point is shown to lose less than 30 points")


def test_confidence_exits_at_the_stages_by_a_threshold_of_each(settings):
    env = gym.make_vec("SD/Classification-Custom-Staged-v0", num_envs=1, **settings).unwrapped
    agent, split = make_agent("confidence", env), env.core.split("train")
    rows = np.arange(len(split))
    confidence = agent.confidence(split, rows)
    assert confidence.shape == (len(split), 2)  # before the middle layer, and at the end
    sure = confidence[:, 0] >= (threshold := float(np.median(confidence[:, 0])))
    decided = Exit(agent, np.array([threshold, 1.01])).decide_split(split, rows)
    expected = np.where(sure[:, None], [0, 0, 1, 1, 1, 1, 0], 0)
    np.testing.assert_array_equal(decided.decisions, expected)
    np.testing.assert_array_equal(decided.flops, np.where(sure, 0, split.costs.head_flops(rows)))
    once = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped
    with pytest.raises(ValueError, match="confidence decides at the stages"):
        make_agent("confidence", once)


def test_confidence_has_a_threshold_for_each_stage(settings, monkeypatch):
    """Planted: every other input is right and 60% sure from the first look on; the others are wrong until the end, 55%
    sure at the first look and 90% at the second. One threshold for both looks lets nobody leave.
    """
    keys = {**settings, "stages": ["encoder.1", "encoder.2"]}
    env = gym.make_vec("SD/Classification-Custom-Staged-v0", num_envs=1, **keys).unwrapped
    agent = make_agent("confidence", env)

    def score(core, split, rows, masks):
        ran = np.repeat(6 - masks[:, :-1].sum(axis=1, keepdims=True), len(rows), axis=1)
        quality = 1.0 * ((rows % 2 == 0) | (ran == 6))
        return {"quality": quality, "quality_ref": np.ones(ran.shape), "flops_ratio": ran / 6}

    sure = np.array([[0.6, 0.6, 0.6], [0.55, 0.9, 0.9]])
    monkeypatch.setattr(early_exit, "score_masks", score)
    monkeypatch.setattr(agent, "confidence", lambda split, rows: sure[rows % 2])
    *single, lossless = agent.operating_points()[: len(early_exit.THRESHOLDS)]
    exits = [early_exit.exits_of(sure, point.policy.thresholds).tolist() for point in single]
    assert [0, 2] not in exits
    assert early_exit.exits_of(sure, lossless.policy.thresholds).tolist() == [0, 2]


def test_early_exit_needs_a_classifier():
    env = gym.make_vec("SD/Classification-Mini-v0", num_envs=1, train_size=50).unwrapped
    with pytest.raises(ValueError, match="early exit and confidence need an encoder that classifies"):
        make_agent("early-exit", env)
