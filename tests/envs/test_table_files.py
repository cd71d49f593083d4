"""A damaged table is told."""

import copy
import json
import shutil
from functools import reduce
from operator import getitem

import gymnasium as gym
import numpy as np
import pytest

from sd_gym.files import map_arrays, write_arrays
from tests.envs.conftest import edited

ID = "SD/Table-v0"


def shortened(folder):
    file = folder / "test.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def swapped(folder):
    shutil.copy(folder / "train.safetensors", folder / "test.safetensors")


def recosted(folder):
    arrays = {name: np.array(values) for name, values in map_arrays(folder / "test.safetensors").items()}
    arrays["costs"][0] = len(arrays["switched"])
    write_arrays(folder / "test.safetensors", arrays)


def unmasked(folder):
    masks = json.loads((folder / "codebook.json").read_text())
    (folder / "codebook.json").write_text(json.dumps(masks[:-1]))


DAMAGES = {
    "another version": (lambda folder: edited(folder, format=1), "expected a table of format 3, got 1"),
    "not complete": (lambda folder: edited(folder, complete=False), "not complete"),
    "no switches": (lambda folder: edited(folder, backbone=None), "'backbone' is None"),
    "no JSON": (lambda folder: (folder / "table.json").write_text("{"), "damaged: expected JSON"),
    "no table": (lambda folder: (folder / "table.json").unlink(), r"no table\.json in .*; expected a table"),
    "no split": (lambda folder: (folder / "test.safetensors").unlink(), r"no test\.safetensors"),
    "cut": (shortened, "damaged: expected safetensors"),
    "swapped": (swapped, "damaged: expected quality of shape"),
    "no ids": (lambda folder: (folder / "test.json").write_text("{}"), "expected the ids of"),
    "no codebook": (lambda folder: (folder / "codebook.json").unlink(), r"codebook\.json"),
    "a mask less": (unmasked, "codebook.json is damaged: expected .* masks, got"),
    "other costs": (recosted, "instances have costs that it lacks"),
    "no projection": (lambda folder: edited(folder, pca=3), r"no projection\.safetensors"),
    "other masks": (lambda folder: (folder / "codebook.json").write_text("[[0, 0]]"), "expected 7: one for each of"),
}


@pytest.mark.parametrize("value", [None, "x", [1], -1, ...], ids=str)
def test_any_wrong_or_missing_value_is_told_or_does_no_harm(value, small_table, tmp_path):
    folder = tmp_path / "table"
    shutil.copytree(small_table, folder)
    whole, told = json.loads((folder / "table.json").read_text()), 0
    parts = [(), *((part,) for part in ("backbone", "observation", "splits")), ("splits", "train")]
    for part in parts:
        for key in reduce(getitem, part, whole):
            described = copy.deepcopy(whole)
            values = reduce(getitem, part, described)
            values[key] = value
            if value is ...:
                del values[key]
            (folder / "table.json").write_text(json.dumps(described))
            try:
                env = gym.make(ID, table=str(folder), disable_env_checker=True)
                for split in ("train", "test"):
                    env.reset(seed=0, options={"split": split})
                    env.step(env.action_space.sample())
            except (ValueError, FileNotFoundError):
                told += 1
    assert told > len(parts)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_table_is_told(what, small_table, tmp_path):
    folder = tmp_path / "table"
    shutil.copytree(small_table, folder)
    damage, words = DAMAGES[what]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        gym.make(ID, table=str(folder)).reset(options={"split": "test"})
