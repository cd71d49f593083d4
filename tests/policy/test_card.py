"""The files of a policy: those of another one are refused, and so is whatever was changed in them."""

import contextlib
import json
import shutil
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from sd_gym.agents.experiment.export import export, run_card
from sd_gym.agents.runs.folder import run_description

from sd_gym import SkipPolicy
from sd_gym.files import read_tensors, write_tensors
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.card import FILE, HASHED, TENSORS, OperatingPoint, model_card, read_card, write_card
from tests.conftest import sign
from tests.envs.conftest import RESULT

ID = "SD/Classification-Mini-v0"
SMALL = {"train_size": 40, "validation_size": 20, "test_size": 20, "token_shares": [0.0, 0.25]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two policies of one env."""
    core = gym.make_vec(ID, num_envs=1, **SMALL).unwrapped.core
    folder = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        size = core.observation_space.shape[-1]
        network = DecisionPolicy(size, core.nvec.tolist(), core.backbone.board.names).eval()
        said = run_description({"env": ID, "algo": "ppo", "steps": 1, "seed": seed}, core.config, core.backbone, {}, ())
        operating_points = [OperatingPoint(-0.5, 0.02, 0.03, 0.4, False), OperatingPoint(0.0, 0.01, 0.02, 0.5, True)]
        card = run_card(RESULT, json.loads(json.dumps(said, default=str)))
        export(core, network, operating_points, card).save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved / "one", tmp_path / "policy"))


@pytest.mark.parametrize("name", [FILE, "policy.safetensors"])
def test_a_file_of_another_policy_is_refused(name, saved, folder):
    SkipPolicy.from_pretrained(folder)
    shutil.copy(saved / "other" / name, folder / name)
    with pytest.raises(ValueError, match=r"is not the file that was saved with this policy.*copy the policy's folder"):
        SkipPolicy.from_pretrained(folder)


@pytest.mark.parametrize("name", HASHED)
def test_a_flipped_byte_is_refused(name, folder):
    file = folder / name
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=rf"{name} is not the file that was saved with this policy"):
        SkipPolicy.from_pretrained(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in"):
        SkipPolicy.from_pretrained(folder)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_deviation_that_is_not_above_zero_is_refused(value, folder):
    tensors = read_tensors(folder / TENSORS)
    tensors["deviation"][3] = value
    write_tensors(folder / TENSORS, tensors)
    sign(folder)
    with pytest.raises(ValueError, match="expected deviation above 0, got"):
        SkipPolicy.from_pretrained(folder)


def places(value, path=()):
    """Paths to all fields, and to the first element of each list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def changes(whole):
    """JSON with one field left out or replaced, of each field."""
    for path in places(whole):
        for value in ("delete", None, -1, [], {}, "x", True, 1e400):
            changed = json.loads(json.dumps(whole))
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if value == "delete":
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            if json.dumps(changed) != json.dumps(whole):
                yield path, changed


def test_every_change_of_a_field_of_the_card_is_refused(folder):
    file = folder / FILE
    found = list(changes(json.loads(file.read_text())))
    assert len(found) > 700
    for path, changed in found:
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=FILE) as error:
            SkipPolicy.from_pretrained(folder)
        field = next(str(key) for key in reversed(path) if isinstance(key, str))
        assert field in str(error.value) or "is not the file that was saved" in str(error.value)


def test_every_change_of_a_field_of_the_network_is_refused_or_is_a_network(folder):
    file = folder / "policy.json"
    for _, changed in changes(json.loads(file.read_text())):
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"policy\.json is not the file"):
            SkipPolicy.from_pretrained(folder)
        with contextlib.suppress(ValueError):
            DecisionPolicy.load(folder)


def test_the_card_tells_what_is_known(folder):
    text, card = (folder / "README.md").read_text(), read_card(folder)
    assert "25.0% of the answers went on densely." in text
    assert "Operating points, tested" in text
    del card["result"]["goes_on"]  # as in cards of before
    text = model_card(card, ())
    assert "went on" not in text
    assert "perating points" not in text


def test_a_card_without_keys_of_its_env_has_their_defaults(folder):
    card = json.loads((folder / FILE).read_text())
    card["env"].pop("tokens")
    del card["env"]["data"]["unanswerable"]
    write_card(folder, {key: value for key, value in card.items() if key not in ("format", "files")})
    env = read_card(folder)["env"]
    assert env["tokens"] == {"shares": [0.0], "ranking": "idf"}
    assert env["data"]["unanswerable"] is True
    with pytest.raises(ValueError, match="the policy has 2 token levels, "):
        SkipPolicy.from_pretrained(folder)
