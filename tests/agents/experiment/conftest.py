"""A run of the hash agent."""

import json
import shutil

import numpy as np
import pytest

import sd_gym
from tests.conftest import WORDS

CUSTOM = "SD/Classification-Custom-v0"


class Killed(BaseException):
    """Stands for a kill, which no run reports as its failure."""


@pytest.fixture(scope="module")
def hash_run(tmp_path_factory, tiny_backbone):
    """A run whose policy decides differently on different inputs, and where its data are."""
    folder = tmp_path_factory.mktemp("finished")
    backbone = folder / "backbone"
    shutil.copytree(tiny_backbone, backbone)
    random = np.random.default_rng(0)
    rows = [{"text": " ".join(random.choice(WORDS, 6)) + f" {'fine ' * (n % 4)}", "label": n % 2} for n in range(120)]
    rows = list({row["text"]: row for row in rows}.values())
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(folder / "reviews.jsonl"), "backbone": str(backbone), "epsilon": 0.3}
    sd_gym.train(CUSTOM, "hash", folder / "run", steps=1, **settings)
    return folder
