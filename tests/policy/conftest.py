"""Data in which the order of words decides, and small policies."""

import itertools
import json

import numpy as np
import pytest
import torch

from sd_gym.policy import DecisionPolicy
from tests.conftest import make_model, save

QUICK = {
    "ppo": {"num_envs": 32},
    "a2c": {"num_envs": 32},
    "ppo_lex": {"num_envs": 32},
    "ppo_lagrangian": {"num_envs": 32},
    "reinforce": {"num_envs": 8, "imagined": 16, "tries": 4, "updates": 1, "fit_batch": 16},
    "imitation": {"instances": 40, "epochs": 2},
}


def policy_of(seed, *, nvec=(2, 2, 2, 2, 3), **kwargs):
    """A policy that decides on many inputs differently, and inputs."""
    torch.manual_seed(seed)
    policy = DecisionPolicy(4, list(nvec), [f"switch {number}" for number in range(len(nvec) - 1)], **kwargs).eval()
    with torch.no_grad():
        policy.head.weight.mul_(20)
    return policy, np.random.default_rng(seed).normal(size=(60, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def orders(tmp_path_factory, tiny_tokenizer):
    """Texts of the same five words in all orders, and a backbone whose first layer's input has no positions."""
    folder = tmp_path_factory.mktemp("orders")
    model = make_model("bert")
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
        model.bert.embeddings.LayerNorm.weight.mul_(0.1)  # or sums of floats tell their order, in their last bits
    save(model, tiny_tokenizer, folder / "backbone")
    texts = [" ".join(words) for words in itertools.permutations(["food", "not", "good", "was", "fine"])]
    rows = "".join(json.dumps({"text": text, "label": number % 2}) + "\n" for number, text in enumerate(texts))
    (folder / "data.jsonl").write_text(rows)
    return {
        "dataset": str(folder / "data.jsonl"),
        "backbone": str(folder / "backbone"),
        "max_source_length": 9,
    }


def is_negated(split, rows):
    return np.array(["not good" in split.instances[row].source for row in rows])
