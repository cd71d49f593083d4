"""What nobody can do better."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.baselines.search import exhaustive_search
from sd_gym.agents.experiment.run import train
from sd_gym.agents.registry import make_agent

from tests.agents.baselines.conftest import good_in


def test_no_policy_saves_more_than_the_oracle(settings, tmp_path):
    oracle = train("SD/Classification-Custom-v0", "oracle", tmp_path / "oracle", steps=1, **settings)
    static = train("SD/Classification-Custom-v0", "static", tmp_path / "static", steps=1, **settings)
    assert oracle["quality"] >= oracle["quality_ref"]
    assert oracle["flops_ratio"] <= static["flops_ratio"]
    assert not (tmp_path / "oracle" / "policy.json").exists()
    assert oracle["time"] == {}


@pytest.mark.parametrize("table", ["TREC-Table-v1", "TREC-Staged-Table-v0"])
def test_on_a_table_the_oracle_knows_all_decisions(table):
    env = gym.make_vec(f"SD/Classification-{table}", num_envs=1).unwrapped
    core, split = env.core, env.core.split("test")
    rows = np.arange(len(split))[::-1]
    decisions, flops = make_agent("oracle", env).decide_split(split, rows)
    good = good_in(core, split)
    assert good(rows, decisions).all()
    assert not flops.any()
    best = exhaustive_search(core, split, rows[:100], good)
    found, least = (split.costs.flops_ratio(rows[:100], some) for some in (decisions[:100], best))
    np.testing.assert_array_equal(found, least)
