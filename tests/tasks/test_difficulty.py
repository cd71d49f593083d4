"""Compute against what is known of an instance, where the data have no levels and where they have."""

import json

import gymnasium as gym
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sd_gym.agents.learning.decisions import outcomes

from sd_gym.tasks.difficulty import means_by, quartiles
from tests.conftest import dense_policy


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60))
def test_quartiles_keep_the_order_and_hold_a_quarter_each(values):
    values = np.array(values)
    levels = quartiles(values)
    assert set(levels) <= {1, 2, 3, 4}
    order = np.argsort(values, kind="stable")
    assert (np.diff(levels[order]) >= 0).all()
    assert all(len(set(levels[values == value])) == 1 for value in set(values.tolist()))
    distinct = quartiles(np.arange(len(values)))
    assert np.ptp([(distinct == level).sum() for level in range(1, 5)]) <= 1


def test_means_by_group():
    columns = {"quality": np.array([1.0, 0.0, 1.0])}
    assert means_by(np.array(["b", "a", "b"]), columns) == [
        {"group": "a", "instances": 1, "quality": 0.0},
        {"group": "b", "instances": 2, "quality": 1.0},
    ]


def test_the_datas_own_levels_come_first(tmp_path, tiny_backbone):
    rows = [{"text": "good" + " fine" * (n % 20), "label": n % 2, "difficulty": 1 + n % 3} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(tmp_path / "data.jsonl"), "backbone": str(tiny_backbone)}
    split = gym.make("SD/Classification-Custom-v0", **settings).unwrapped.core.split("train")
    assert set(split.levels) == {1, 2, 3}


def test_scoring_is_not_changed_by_looking_at_difficulty(settings):
    core = gym.make("SD/Classification-Custom-v0", **settings).unwrapped.core
    policy = dense_policy("SD/Classification-Custom-v0", **settings)
    before = outcomes(core, policy, core.split("test"))
    assert core.split("test").levels.shape == (4,)
    after = outcomes(core, policy, core.split("test"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
