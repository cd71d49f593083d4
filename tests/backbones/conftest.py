"""A backbone to be broken."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(tmp_path, tiny_backbone):
    """A copy to be broken."""
    return shutil.copytree(tiny_backbone, tmp_path / "backbone")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
