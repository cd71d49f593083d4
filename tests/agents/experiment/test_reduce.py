"""``sd-gym reduce``: a run of its own whose policy makes few different decisions."""

import json

import pytest
import torch
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.policy import DecisionPolicy


@pytest.fixture
def run(tmp_path, reviews, tiny_backbone):
    """A run with a policy that decides differently on each input."""
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone), "overlap": "allow", "epsilon": 1.0}
    folder = tmp_path / "run"
    sd_gym.train("SD/Classification-Custom-v0", "ppo", folder, steps=200, strictness=0, **settings)
    policy = DecisionPolicy.load(folder)
    with torch.no_grad():
        policy.head.weight.normal_(std=20)
        policy.head.bias.zero_()
    policy.save(folder)
    return folder


def test_the_reduced_run_stands_beside_the_one_it_was_made_of(run, tmp_path):
    done = CliRunner().invoke(app, ["reduce", str(run), "--codebook", "3", "--output", str(tmp_path / "few")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "few" / "result.json").read_text())
    assert result["decisions_used"] <= 3
    assert len(sd_gym.SkipPolicy.from_pretrained(tmp_path / "few").network.codebook) <= 3
    rows = sd_gym.compare([run, tmp_path / "few"])
    assert sorted(row["agent"] for row in rows) == ["ppo (codebook 3)", "ppo (codebook None)"]
    model = sd_gym.load(tmp_path / "few")
    assert len({tuple(one.skip) for one in model(["good food", "the room was bad", "awful", "fine fine room"])}) <= 3
    sd_gym.detach(model.model)
    again = CliRunner().invoke(app, ["reduce", str(run), "--output", str(tmp_path / "few")])
    assert again.exit_code == 2
    assert "is not empty" in again.output


def test_what_decides_at_random_is_not_reduced(run, tmp_path):
    policy = DecisionPolicy.load(run)
    policy.noise = "hash"
    policy.save(run)
    with pytest.raises(ValueError, match="decides at random"):
        sd_gym.reduce(run, 4, tmp_path / "few")
