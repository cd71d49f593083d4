"""What decisions are worth: each row as alone, and computed once."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.envs.conftest import MINI, SMALL
from tests.execution.conftest import random_decisions


@pytest.mark.parametrize("shares", [(0.0,), (0.0, 0.1, 0.3)])
@pytest.mark.parametrize("env_id", MINI)
def test_a_batch_of_mixed_decisions_scores_as_each_row_alone(env_id, shares):
    core = gym.make(env_id, **SMALL, token_shares=shares).unwrapped.core
    split, rows = core.split("train"), np.arange(60)
    decisions = random_decisions(core, 60, 0.5)
    together = split.scoring.run(rows, decisions)
    alone = np.array([split.scoring.run(rows[i : i + 1], decisions[i : i + 1])[0] for i in range(60)])
    np.testing.assert_array_equal(together, alone)
    assert 0 < together.mean() < 1


@pytest.mark.parametrize("env_id", MINI)
def test_exact_match_of_one_forward_pass_is_exact_match_of_generating(env_id):
    core = gym.make(env_id, **SMALL, token_shares=[0.0, 0.1]).unwrapped.core
    backbone, split, rows = core.backbone, core.split("test"), np.arange(20)
    decisions = random_decisions(core, 20, 0.2, seed=1)
    inputs = split.passes.inputs(rows)
    inputs.pop("labels")
    with (
        torch.inference_mode(),
        split.backbone.board.decide(decisions[:, :-1], split.tokens.kept(rows, decisions[:, -1])),
    ):
        tokens = backbone.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    texts = backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    generated = [float(text == split.instances[row].target) for row, text in zip(rows, texts, strict=True)]
    np.testing.assert_array_equal(split.scoring.run(rows, decisions), generated)


def test_more_than_255_token_levels_are_told_apart():
    shares = [round(level * 0.003, 3) for level in range(300)]
    core = gym.make("SD/Classification-Mini-v0", **SMALL, token_shares=shares, quality="likelihood").unwrapped.core
    split, rows = core.split("test"), np.arange(SMALL["test_size"])
    for level in (0, 256, 299, 43):  # 256 and 299 are 0 and 43 in eight bits
        decisions = np.zeros((len(rows), len(core.nvec)), dtype=np.int64)
        decisions[:, -1] = level
        np.testing.assert_array_equal(split.scoring.quality(rows, decisions)[0], split.scoring.run(rows, decisions))
    assert split.scoring.quality(rows, decisions)[0].mean() < split.scoring.quality(rows, decisions)[1].mean()


def test_where_the_reference_becomes_more_likely_the_quality_is_above_one(reviews, tiny_backbone):
    """So that what is gained makes up for what is lost: the limit is on the mean of both."""
    files = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    core = gym.make("SD/Classification-Custom-v0", **files, quality="likelihood").unwrapped.core
    split, rows = core.split("train"), np.arange(len(core.split("train")))
    decisions = random_decisions(core, len(rows), 0.5)
    quality, likely = split.scoring.quality_and_likelihood(rows, decisions)
    change = np.log(likely / split.scoring.quality_and_likelihood(rows, 0 * decisions)[1])
    assert (change > 0.05).any()
    assert (change < -0.05).any()
    np.testing.assert_allclose(quality, 1 + np.clip(change, -1, 1), rtol=1e-5)
    np.testing.assert_allclose(split.scoring.quality(rows, decisions)[0], quality, rtol=1e-5)


def test_scores_are_computed_once(monkeypatch):
    env = gym.make_vec(MINI[0], num_envs=4, **SMALL, penalty=9.0).unwrapped
    split = env.core.split("train")
    runs = []
    original = split.scoring.run
    monkeypatch.setattr(
        split.scoring, "run", lambda rows, decisions: (runs.append(len(rows)), original(rows, decisions))[1]
    )
    rows, decision = np.array([0, 1, 2, 2]), np.zeros((4, len(env.core.nvec)), dtype=int)
    decision[:, 0] = 1
    first = env.core.score(split, rows, decision)
    assert runs == [6]  # three instances, each switched and dense; the repeated one is not run again
    second = env.core.score(split, rows, decision)
    assert runs == [6]
    np.testing.assert_array_equal(first.quality, second.quality)
