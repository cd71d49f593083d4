"""``sd-gym validate``: a run is played again, and whatever was changed is caught."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_gym.agents.experiment.evaluation import decisions_hash
from sd_gym.agents.experiment.replay import ReplayError, read_instances, replay
from sd_gym.agents.experiment.trained import run_config
from sd_gym.agents.runs.folder import read_description
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.envs.core import _backbone_core
from sd_gym.envs.shared import shared_core

CUSTOM = "SD/Classification-Custom-v0"


@pytest.fixture
def run(hash_run, tmp_path):
    shutil.copytree(hash_run / "run", tmp_path / "run")
    yield tmp_path / "run"
    _backbone_core.cache_clear()


def rows_of(run):
    with (run / "instances.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(run, rows):
    with (run / "instances.csv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def core_of_run(run):
    return shared_core(run_config(read_description(run)))


def recorded_hash(run):
    return decisions_hash(read_instances(run / "instances.csv", core_of_run(run).mask_nvec).decisions)


def change_result(run, **values):
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | values))
    return result


def test_a_run_that_is_as_it_was_passes(run):
    replayed = replay(run)
    assert (replayed.split, replayed.instances, replayed.has_policy) == ("test", len(rows_of(run)), True)
    shown = CliRunner().invoke(app, ["validate", str(run)])
    assert shown.exit_code == 0, shown.output
    assert "decides the same again" in shown.output


def test_data_and_backbone_may_be_elsewhere_now(run):
    description = json.loads((run / "config.json").read_text())
    values = description["env_config"]
    places = {"dataset": values["data"]["dataset"], "backbone": values["backbone"]["name"]}
    values["data"]["dataset"], values["backbone"]["name"] = "gone.jsonl", "./gone"
    (run / "config.json").write_text(json.dumps(description))
    with pytest.raises(FileNotFoundError, match=r"gone"):
        replay(run)
    assert replay(run, places).has_policy
    assert replay(run, {"data": {"dataset": places["dataset"]}, "backbone.name": places["backbone"]}).has_policy
    options = [part for key, value in places.items() for part in ("--set", f"{key}={value}")]
    shown = CliRunner().invoke(app, ["validate", str(run), *options])
    assert shown.exit_code == 0, shown.output
    for wrong in ({"epsilon": 1}, {"table": "./table"}):
        with pytest.raises(
            ValueError, match="a run keeps its settings; only its dataset and backbone may be elsewhere"
        ):
            replay(run, wrong)


def test_a_reward_that_is_not_known_here_is_not_replayed(run):
    """That of an own objective, without its --import."""
    description = json.loads((run / "config.json").read_text())
    description["env_config"]["reward"]["objective"] = "somebodys"
    (run / "config.json").write_text(json.dumps(description))
    assert replay(run).has_policy


def test_a_run_without_a_policy_is_replayed_from_its_decisions(hash_run, tmp_path):
    def cheap(observations):
        return np.tile([1, 0, 0, 0, 0, 1, 0], (len(observations), 1))

    config = json.loads((hash_run / "run" / "config.json").read_text())["env_config"]
    settings = {part: config[part] for part in ("data", "backbone", "reward")}
    sd_gym.evaluate(CUSTOM, cheap, output=tmp_path / "other", policy_flops=1000, **settings)
    assert not replay(tmp_path / "other").has_policy
    rows = rows_of(tmp_path / "other")
    rows[0]["flops_ratio_with_policy"] = float(rows[0]["flops_ratio_with_policy"]) + 0.1
    write_rows(tmp_path / "other", rows)
    with pytest.raises(ReplayError, match=r"result\.json: flops_ratio_with_policy is .*, and .* when replayed"):
        replay(tmp_path / "other")


def test_a_changed_decision_is_caught(run):
    rows = rows_of(run)
    number = next(n for n, row in enumerate(rows) if row["decision"][0] != row["decision"][2])
    first, second = rows[number]["decision"][0], rows[number]["decision"][2]  # two attentions that cost the same
    rows[number]["decision"] = second + rows[number]["decision"][1] + first + rows[number]["decision"][3:]
    write_rows(run, rows)
    with pytest.raises(ReplayError, match="decisions were changed: their hash is"):
        replay(run)
    result = change_result(run)
    result["decisions_hash"] = recorded_hash(run)  # by somebody who knows it
    (run / "result.json").write_text(json.dumps(result))
    with pytest.raises(
        ReplayError, match=f"quality of|decisions are not the saved policy's, first that of '{rows[number]['id']}'"
    ):
        replay(run)


@pytest.mark.parametrize("name", ["quality", "quality_ref", "flops_ratio"])
def test_a_changed_score_of_an_instance_is_caught(run, name):
    rows = rows_of(run)
    rows[3][name] = 1 - float(rows[3][name]) or 0.5
    write_rows(run, rows)
    with pytest.raises(ReplayError, match=f"{name} of 1 of .* for '{rows[3]['id']}' it is .*, and .* when replayed"):
        replay(run)


@pytest.mark.parametrize("name", ["quality", "flops_ratio_with_policy", "quality_kept", "instances", "skip_rate"])
def test_a_changed_result_is_caught(run, name):
    value = json.loads((run / "result.json").read_text())[name]
    if isinstance(value, dict):
        value["encoder.0.attention"] += 0.1
    else:
        value = not value if isinstance(value, bool) else value * 0.9 if isinstance(value, float) else value + 1
    change_result(run, **{name: value})
    with pytest.raises(ReplayError, match=rf"result\.json: {name}\b.* is .*, and .* when replayed"):
        replay(run)


def test_a_line_that_is_missing_is_caught(run):
    rows = rows_of(run)
    write_rows(run, rows[1:])
    with pytest.raises(ReplayError, match=f"'{rows[1]['id']}' where '{rows[0]['id']}' is expected"):
        replay(run)
    write_rows(run, rows[:-1])
    with pytest.raises(ReplayError, match="the rest is missing"):
        replay(run)


@pytest.mark.parametrize("decision", ["", "x000000", "0000002", "2000000"])
def test_what_is_no_decision_is_caught(run, decision):
    rows = rows_of(run)
    rows[0]["decision"] = decision
    write_rows(run, rows)
    with pytest.raises(ValueError, match=r"instances\.csv is damaged: expected a line per instance"):
        replay(run)


def test_a_file_that_a_spreadsheet_saved_is_read(run):
    rows = rows_of(run)
    (run / "instances.csv").write_text((run / "instances.csv").read_text(), encoding="utf-8-sig")
    assert replay(run).instances == len(rows)


def test_another_policy_is_caught(run):
    weights = load_file(run / "policy.safetensors")
    weights["head.bias"] = weights["head.bias"] - torch.linspace(-20, 20, len(weights["head.bias"]))
    save_file(weights, run / "policy.safetensors")
    with pytest.raises(ReplayError, match="decisions are not the saved policy's"):
        replay(run)


def changed_backbone(hash_run, tmp_path, run):
    """The run, with its backbone at another place and other weights there."""
    backbone = tmp_path / "backbone"
    shutil.copytree(hash_run / "backbone", backbone)
    weights = load_file(backbone / "model.safetensors")
    save_file(
        {name: one + 0.5 * torch.randn_like(one) for name, one in weights.items()},
        backbone / "model.safetensors",
        {"format": "pt"},
    )
    description = json.loads((run / "config.json").read_text())
    description["env_config"]["backbone"]["name"] = str(backbone)
    return description


def test_another_backbone_is_caught(hash_run, tmp_path, run):
    description = changed_backbone(hash_run, tmp_path, run)
    (run / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="has other weights than in training"):
        replay(run)
    description["weights"] = core_of_run(run).backbone.weights
    (run / "config.json").write_text(json.dumps(description))
    with pytest.raises(ReplayError, match="is not what their decisions give"):
        replay(run)


def test_other_data_are_caught(tmp_path, run):
    description = json.loads((run / "config.json").read_text())
    lines = Path(description["env_config"]["data"]["dataset"]).read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    description["env_config"]["data"]["dataset"] = str(tmp_path / "other.jsonl")
    (run / "config.json").write_text(json.dumps(description))
    shown = CliRunner().invoke(app, ["validate", str(run)])
    assert shown.exit_code == 2
    assert "the data have changed" in shown.stderr


def test_what_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        replay(tmp_path)
