"""Compute against what is known of an instance, where the data have no levels and where they have."""

import csv
import json

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_gym.agents.experiment.evaluation import evaluate
from sd_gym.agents.experiment.run import train
from sd_gym.agents.learning.decisions import decide_and_score
from transformers import AutoModelForSequenceClassification

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


@pytest.fixture
def settings(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone)}


def test_reports_take_the_dense_loss_where_the_data_have_no_level(settings, tiny_backbone, tiny_tokenizer):
    core = gym.make("SD/Classification-Custom-v0", **settings).unwrapped.core
    split = core.split("train")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_backbone).eval()
    inputs = tiny_tokenizer([one.source for one in split.instances], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    log_prob = model(**inputs).logits.log_softmax(-1)
    expected = [-log_prob[row, one.target].item() for row, one in enumerate(split.instances)]
    np.testing.assert_allclose(split.dense_loss, expected, rtol=1e-3, atol=1e-5)
    assert (split.levels == quartiles(split.dense_loss)).all()
    result = evaluate(core, dense_policy("SD/Classification-Custom-v0", **settings), "train")
    levels = result["by_difficulty"]
    assert sum(level["instances"] for level in levels) == 32
    assert levels[0]["quality_ref"] >= levels[-1]["quality_ref"]
    assert set(result["by_fact"]) == {"source_length", "dense_loss", "label"}
    assert [group["group"] for group in result["by_fact"]["label"]] == ["0", "1"]
    lengths = [group["source_length"] for group in result["by_fact"]["source_length"]]
    assert lengths == sorted(lengths)
    json.dumps(result)


def test_the_datas_own_levels_come_first(tmp_path, tiny_backbone):
    rows = [{"text": "good" + " fine" * (n % 20), "label": n % 2, "difficulty": 1 + n % 3} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(tmp_path / "data.jsonl"), "backbone": str(tiny_backbone)}
    split = gym.make("SD/Classification-Custom-v0", **settings).unwrapped.core.split("train")
    assert set(split.levels) == {1, 2, 3}


def test_a_run_keeps_what_came_of_each_instance(settings, tmp_path):
    result = train("SD/Classification-Custom-v0", "random", tmp_path / "run", steps=10, settings=settings)
    with (tmp_path / "run" / "instances.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["id"] for row in rows] == [f"test-{n}" for n in range(4)]
    assert np.mean([float(row["flops_ratio"]) for row in rows]) == pytest.approx(result["flops_ratio"])
    assert all(set(row["decision"]) <= {"0", "1"} for row in rows)
    assert set(result["data"]) == {"train", "validation", "test"}
    counted = {"instances": 4, "cut_inputs": 0, "cut_targets": 0, "left_out": 0, "dropped": 0, "also_in": {}}
    assert counted.items() <= result["data"]["test"].items()


def test_scoring_is_not_changed_by_looking_at_difficulty(settings):
    core = gym.make("SD/Classification-Custom-v0", **settings).unwrapped.core
    policy = dense_policy("SD/Classification-Custom-v0", **settings)
    before = decide_and_score(core, policy, core.split("test"))
    assert core.split("test").levels.shape == (4,)
    after = decide_and_score(core, policy, core.split("test"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
