"""A cascade and an early exit are constant policies with a threshold, in an env whose last stage is the answer."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents import make_agent
from sd_gym.agents.baselines.early_exit import THRESHOLDS, Exit
from sd_gym.agents.learning.decisions import outcomes, score_decisions

from sd_gym.envs.spaces import flat_size
from sd_gym.policy import DecisionPolicy
from tests.conftest import write_reviews


@pytest.fixture(scope="module")
def keys(tmp_path_factory, tiny_backbone):
    file = write_reviews(tmp_path_factory.mktemp("data") / "reviews.jsonl")
    return {"dataset": str(file), "backbone": str(tiny_backbone)}


def env_of(keys, *stages):
    return gym.make_vec("SD/Classification-Custom-v0", num_envs=1, stages=list(stages), **keys).unwrapped


def constant(core, mask, log_odds):
    """This mask for all, and on from answers that are less sure."""
    policy = DecisionPolicy(
        flat_size(core.observation_space), core.nvec.tolist(), core.switch_names, stages=core.stages
    )
    with torch.no_grad():
        for values in policy.parameters():
            values.zero_()
        policy.body[0].weight[0, -3], policy.body[0].bias[0] = 1, -log_odds  # of the head's judgement, the first
        policy.body[2].weight[0, 0] = policy.head.weight[-2, 0] = 1
        policy.head.bias[torch.from_numpy(np.cumsum([0, *core.nvec[:-2]]) + mask)] = 1
    return policy


@pytest.mark.parametrize("mask", [[0, 1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], ids=str)
def test_a_cascade_is_one(mask, keys):
    env = env_of(keys, "first", "answer")
    core, split, agent = env.core, env.core.split("train"), make_agent("cascade", env)
    rows, mask = np.arange(len(split)), np.array(mask)
    masks = np.tile(core.from_masks(mask[None]), (len(rows), 1))
    confidence, both = split.passes.confidence(rows, np.tile(mask, (len(rows), 1))), split.costs.going_on(rows, masks)
    agent.masks, shares = masks[:1], []
    for point, threshold in zip(agent.operating_points(), [*THRESHOLDS[THRESHOLDS < 1][::-1], 0], strict=True):
        unsure = confidence < threshold
        wanted = score_decisions(core, split, rows, np.where(unsure[:, None], 0, masks))
        came = outcomes(core, point.policy, split)
        np.testing.assert_array_equal(came["decision"], np.tile(mask, (len(rows), 1)))
        np.testing.assert_array_equal(came["goes_on"], unsure)
        np.testing.assert_array_equal(came["quality"], wanted["quality"])
        flops = split.costs.flops(rows, masks) + unsure * both
        np.testing.assert_allclose(came["flops_ratio"], flops / split.costs.dense_flops(rows))
        shares.append(unsure.mean())
    assert shares[-1] == 0
    assert len(set(shares)) > 2


@pytest.mark.parametrize("layer", [1, 2])
def test_an_early_exit_is_the_mask_that_skips_the_rest_and_going_on(layer, keys):
    core, exits = env_of(keys, "first", "answer").core, env_of(keys, f"encoder.{layer}")
    agent, split = make_agent("confidence", exits), core.split("train")
    rows, mask = np.arange(len(split)), np.append(np.arange(6) >= 2 * layer, 0).astype(int)
    threshold = np.median(agent.confidence(split, rows)[:, 0]) - 1e-6
    decisions, spent = Exit(agent, np.array([threshold, 1.01])).decide_split(split, rows)
    assert 0 < (leaves := decisions.any(axis=1)).sum() < len(rows)
    wanted = score_decisions(exits.core, split, rows, decisions)
    came = outcomes(core, constant(core, mask, np.log(threshold / (1 - threshold))), split)
    np.testing.assert_array_equal(came["quality"], wanted["quality"])
    np.testing.assert_allclose(came["flops_ratio"], wanted["flops_ratio"] + spent / split.costs.dense_flops(rows))
    assert ((came["flops_ratio"] > 1) == ~leaves).all()
