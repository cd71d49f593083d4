"""Return, regret, the report and the FLOPs at which the quality is kept rank policies alike."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.report.collect import collect
from sd_gym.agents.report.compare import compare

import sd_gym
from sd_gym.envs.exact import best_rewards
from sd_gym.objectives import Objective

ENV = "SD/Classification-TREC-Table-v1"


@pytest.fixture(scope="module")
def known():
    """The decisions of five policies, from the worst to the best, by name; int64 ``[rows, components]`` each."""
    core = gym.make(ENV).unwrapped.core
    split = core.split("test")
    rows, coin = np.arange(len(split)), np.random.default_rng(0).random(len(split)) < 0.5
    quality, flops = split.scoring.of_masks(rows), split.costs.of_masks(rows)
    rewards = 1 - flops - 20 * (quality[:, :1] - quality)
    dense, static = np.zeros_like(rows), np.full_like(rows, rewards.mean(axis=0).argmax())
    oracle = rewards.argmax(axis=1)
    numbers = {
        "dense": dense,
        "coin": np.where(coin, static, dense),
        "best-mask": static,
        "half-oracle": np.where(coin, oracle, static),
        "all-oracle": oracle,
    }
    return {name: core.from_masks(core.masks[masks]) for name, masks in numbers.items()}


def test_five_policies_have_one_order(known, tmp_path, monkeypatch):
    monkeypatch.setattr("sd_gym.agents.experiment.run.plot_run", lambda *_: None)
    results = {
        name: sd_gym.evaluate(ENV, lambda seen, masks=masks: masks, output=tmp_path / name, name=name, policy_flops=0)
        for name, masks in known.items()
    }
    best_first = list(known)[::-1]
    assert all(result["quality_kept"] for result in results.values())
    assert sorted(results, key=lambda name: -results[name]["return"]) == best_first
    assert sorted(results, key=lambda name: results[name]["regret"]) == best_first
    assert sorted(results, key=lambda name: results[name]["flops_ratio_with_policy"]) == best_first
    (env,) = collect(tmp_path / name for name in known)
    assert [agent.name for agent in env.agents] == best_first
    rows = {row["agent"]: row for row in compare(tmp_path / name for name in known)}
    assert [rows[name]["return"] for name in known] == [results[name]["return"] for name in known]
    split = gym.make(ENV).unwrapped.core.split("test")
    assert results["all-oracle"]["return"] == pytest.approx(best_rewards(split).mean())
    assert results["dense"]["return"] == 0.0


def test_a_reward_that_ignores_gains_ranks_the_best_mask_below_dense():
    """Where dense errs often: a mask gains nearly as many answers as it loses, and saves FLOPs."""
    env_id, worth = "SD/QuestionAnswering-QAMR-Table-v0", {}
    for gains in ("counted", "ignored"):
        core = gym.make(env_id, gains=gains).unwrapped.core
        split, rows = core.split("test"), np.arange(len(core.split("test")))
        quality = split.scoring.of_masks(rows)
        best = (quality.mean(axis=0)[1:]).argmax() + 1
        outcome = core.score(split, rows, core.from_masks(core.masks[np.full(len(rows), best)]))
        assert outcome.cost.mean() < 0.005
        rewards = Objective(core.config.reward).rewards(outcome.quality, outcome.quality_ref, outcome.flops_ratio)
        worth[gains] = rewards.mean()
    assert worth["ignored"] < 0 < worth["counted"]
