"""What a decision costs and loses, by what is known of an instance."""

import csv
import json

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.experiment.evaluation import evaluate
from sd_gym.agents.experiment.run import train
from transformers import AutoModelForSequenceClassification

from sd_gym.tasks.difficulty import quartiles
from tests.conftest import dense_policy


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
    counts = [level["instances"] for level in levels]
    assert sum(counts) == 32
    own = np.average([level["flops_ratio_with_policy"] for level in levels], weights=counts)
    assert own == pytest.approx(result["flops_ratio_with_policy"])
    assert levels[0]["quality_ref"] >= levels[-1]["quality_ref"]
    assert set(result["by_fact"]) == {"source_length", "dense_loss", "label"}
    assert [group["group"] for group in result["by_fact"]["label"]] == ["0", "1"]
    lengths = [group["source_length"] for group in result["by_fact"]["source_length"]]
    assert lengths == sorted(lengths)
    json.dumps(result)


def test_a_run_keeps_what_came_of_each_instance(settings, tmp_path):
    result = train("SD/Classification-Custom-v0", "random", tmp_path / "run", steps=10, **settings)
    with (tmp_path / "run" / "instances.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["id"] for row in rows] == [f"test-{n}" for n in range(4)]
    assert np.mean([float(row["flops_ratio"]) for row in rows]) == pytest.approx(result["flops_ratio"])
    assert all(set(row["decision"]) <= {"0", "1"} for row in rows)
    assert set(result["data"]) == {"train", "validation", "test"}
    counted = {"instances": 4, "cut_inputs": 0, "cut_targets": 0, "left_out": 0, "dropped": 0, "also_in": {}}
    assert counted.items() <= result["data"]["test"].items()
