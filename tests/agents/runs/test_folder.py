"""The description in the folder of a run."""

import json

import pytest
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run

from sd_gym.version import __version__

CUSTOM = "SD/Classification-Custom-v0"


def test_a_run_carries_the_mark_of_its_version_and_other_configs_are_none(settings, tmp_path, tiny_backbone):
    train(CUSTOM, "hash", tmp_path / "run", steps=1, **settings)
    file = tmp_path / "run" / "config.json"
    description = json.loads(file.read_text())
    assert description["sd_gym"] == __version__
    file.write_text(json.dumps({**description, "confidence": []}))
    with pytest.raises(ValueError, match=r"does not describe a run.*confidence"):
        load_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"config.json does not describe a run; expected a folder"):
        load_run(tiny_backbone)
