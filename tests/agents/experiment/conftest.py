"""A run of the hash agent."""

import json
import shutil

import numpy as np
import pytest

import sd_gym

CUSTOM = "SD/Classification-Custom-v0"


@pytest.fixture(scope="module")
def hash_run(tmp_path_factory, tiny_backbone):
    """A run whose policy decides differently on different inputs, and where its data are."""
    folder = tmp_path_factory.mktemp("finished")
    backbone = folder / "backbone"
    shutil.copytree(tiny_backbone, backbone)
    words = ["good", "bad", "fine", "awful", "the", "food", "was", "not", "room"]
    random = np.random.default_rng(0)
    rows = [{"text": " ".join(random.choice(words, 6)) + f" {'fine ' * (n % 4)}", "label": n % 2} for n in range(120)]
    rows = list({row["text"]: row for row in rows}.values())
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(folder / "reviews.jsonl"), "backbone": str(backbone), "epsilon": 0.3}
    sd_gym.train(CUSTOM, "hash", folder / "run", steps=1, **settings)
    return folder
