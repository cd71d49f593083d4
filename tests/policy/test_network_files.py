"""A policy's files that were edited, or are of something else, are refused when they are loaded."""

import json

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.registry import make_agent
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.policy import DecisionPolicy

CUSTOM = "SD/Classification-Custom-v0"
SWITCHES = ["a", "b", "c"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    DecisionPolicy(5, [2, 2, 2, 1], SWITCHES, hidden=4).save(tmp_path)
    return tmp_path


def edit(folder, **changes):
    file = folder / "policy.json"
    description = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in description.items() if value != "missing"}))


def edit_weights(folder, change):
    weights = load_file(folder / "policy.safetensors")
    change(weights)
    save_file(weights, folder / "policy.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": "pink"}, r"noise: Input should be 'none', 'random' or 'hash', got 'pink'"),
        ({"colour": "blue"}, r"colour: Extra inputs are not permitted"),
        ({"hidden": "missing"}, r"hidden: Field required"),
        ({"hidden": "64"}, r"hidden: Input should be a valid integer, got '64'"),
        ({"blind": "yes"}, r"blind: Input should be a valid boolean"),
        ({"format": 1}, r"format: Input should be 2, got 1"),
        (
            {"nvec": [2, 2, 1]},
            r"a 2 for each of the 3 switches .* then the number of token levels, .* got \[2, 2, 1\]",
        ),
        ({"nvec": [2, 3, 2, 1]}, r"got \[2, 3, 2, 1\]"),
        ({"nvec": []}, r"nvec: List should have at least 1 item"),
        ({"switches": ["a", "b"]}, r"a 2 for each of the 2 switches"),
        ({"switches": ["a", "b", "b"]}, r"switches that are all different"),
        ({"observation_size": 6}, r"expected body.0.weight of shape \[4, 6\] .*; got \[4, 5\]"),
        ({"hidden": 5}, r"expected body.\d.(weight|bias) of shape \[5"),
        ({"nvec": [2, 2, 2, 3]}, r"expected head.(weight|bias) of shape \[9"),
    ],
)
def test_an_edited_description_is_refused_with_what_was_expected(changes, message, folder):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=rf"policy\.(json|safetensors): .*{message}"):
        DecisionPolicy.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, folder):
    def spoil(weights):
        weights["head.weight"][1, 2] = value

    edit_weights(folder, spoil)
    with pytest.raises(ValueError, match=r"expected finite numbers, but 1 in head\.weight are not"):
        DecisionPolicy.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.update({"head.bias": torch.zeros(3)}),
            r"expected head.bias of shape \[7\] .*got \[3\]",
        ),
        (lambda weights: weights.update({"head.bias": torch.zeros(7).half()}), "torch.float32.*got .*torch.float16"),
        (lambda weights: weights.pop("head.bias"), "missing or unknown: head.bias"),
        (lambda weights: weights.update({"tail": torch.zeros(1)}), "missing or unknown: tail"),
    ],
)
def test_weights_of_another_network_are_refused(change, message, folder):
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        DecisionPolicy.load(folder)


def test_files_that_are_cut_off_or_garbage_are_refused(folder):
    file = folder / "policy.safetensors"
    whole = file.read_bytes()
    for data in (whole[:-10], whole[:4], b"", b"garbage" * 9):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"policy\.safetensors is damaged"):
            DecisionPolicy.load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no policy\.safetensors in"):
        DecisionPolicy.load(folder)
    for text in ("", "{", "[1]", "null"):
        (folder / "policy.json").write_text(text)
        with pytest.raises(ValueError, match=r"policy\.json: not a policy that was saved here"):
            DecisionPolicy.load(folder)


@pytest.mark.parametrize("order", ["reversed", "foreign"])
def test_a_policy_of_other_switches_is_refused_by_the_run(order, reviews, tiny_backbone, tmp_path):
    run, settings = tmp_path / "run", {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    train(CUSTOM, "hash", run, steps=1, **settings)
    switches = json.loads((run / "policy.json").read_text())["switches"]
    changed = switches[::-1] if order == "reversed" else [f"decoder.{number}" for number in range(len(switches))]
    edit(run, switches=changed)
    words = r"the policy decides on the switches \[.*\], but SD/Classification-Custom-v0 has \['encoder.0.attention'"
    with pytest.raises(ValueError, match=words):
        load_run(run)
    with pytest.raises(ValueError, match=words):
        sd_gym.evaluate(CUSTOM, run)
    shown = CliRunner().invoke(app, ["evaluate", str(run)])
    assert (shown.exit_code, "Traceback" in shown.stderr) == (2, False)
    with pytest.raises(ValueError, match="cannot be a start here: its switches is"):
        make_agent("ppo", gym.make_vec(CUSTOM, num_envs=4, **settings).unwrapped, start=run)
