"""Coins between static masks."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.learning.decisions import policy_rows
from stable_baselines3.common.logger import configure

import sd_gym
from sd_gym.envs.exact import hull
from tests.agents.baselines.conftest import nobody


def learned(env_id, tmp_path, **settings):
    agent = make_agent("hull", gym.make_vec(env_id, num_envs=1, **settings).unwrapped)
    agent.learn(1, configure(str(tmp_path), []), nobody)
    return agent


@pytest.mark.parametrize("env_id", ["SD/Classification-TREC-Table-v1", "SD/Table-v0"])
def test_points_are_coins_on_the_hull_of_policy_rows(env_id, full_table, tmp_path):
    """At its FLOPs each loses about as much as the hull says; twice, it decides alike."""
    agent = learned(env_id, tmp_path, **({"table": full_table} if env_id == "SD/Table-v0" else {}))
    core = agent.env.core
    split, rows = core.split("train"), policy_rows(core, 10_000)
    exact = hull(split)
    if env_id != "SD/Table-v0":
        assert len(agent.masks) == 1 + (exact.flops < 1).sum()  # dense, and the hull
    points = agent.operating_points()
    tossed = 0
    for point in points[::5]:
        decisions = point.policy.decide(core.observe(split, rows))
        np.testing.assert_array_equal(decisions, point.policy.decide(core.observe(split, rows)))
        tossed += len(np.unique(decisions, axis=0)) == 2
        if len(rows) > 1000:
            outcome = core.score(split, rows, decisions)
            ends = np.append(exact.flops[exact.flops < 1], 1.0)  # dense is where the coins end, also if a mask gains
            losses = np.append(exact.loss[exact.flops < 1], 0.0)
            order = np.argsort(ends)
            expected = np.interp(outcome.flops_ratio.mean(), ends[order], losses[order])
            assert outcome.cost.mean() == pytest.approx(expected, abs=0.01)
    assert tossed > len(points[::5]) // 2


def test_a_coin_beats_one_mask(tmp_path):
    """Selected alike."""
    results = [sd_gym.train("SD/Classification-TREC-Table-v1", name, tmp_path / name) for name in ("hull", "static")]
    assert results[0]["flops_ratio"] < results[1]["flops_ratio"]
    assert results[0]["artefact"]
