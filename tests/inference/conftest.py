"""Policies attached to models, and files of inputs."""

import json

import numpy as np
import pytest
import torch

import sd_gym
from sd_gym.backbones.heads import head_of
from sd_gym.going_on import ANSWER
from sd_gym.inference.bulk import run_file
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy, weights_hash
from sd_gym.policy.features import input_features
from sd_gym.policy.token_rule import TokenRule
from sd_gym.switch import Switchboard, first_layer_input
from tests.conftest import make_inputs
from tests.envs.conftest import trained


def make_policy(model, *, shares=(0.0,), ranking="position", dense=False, seed=0, stages=("first",), tokens=False):
    """A random policy that decides differently on each input of ``make_inputs``, or one that skips nothing.

    At stages it sees ``tokens``, too, or no tokens.
    """
    board = vars(model).get("_switchboard") or Switchboard(model)
    answers = [ANSWER] * (ANSWER in stages)
    stages = [*board.decided_at([name for name in stages if name != ANSWER]), *answers]
    inputs = make_inputs("bert", batch=64)
    looked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    seen, embedded = input_features(board, looked).numpy(), first_layer_input(board, looked).detach().numpy()
    token_statistics = (embedded.mean(axis=(0, 1)), embedded.std(axis=(0, 1))) if tokens else None
    width = 2 * model.config.hidden_size + 2
    if stages != ["first"]:  # at all of them it is standardised as at the first one
        seen = np.pad(seen, ((0, 0), (0, int(head_of(model).can_exit(board)))), constant_values=0.1)
        seen = np.stack([seen] * len(stages), axis=1) + np.random.default_rng(0).normal(size=(64, len(stages), 1))
        if answers:
            said = np.tile([[[-1.0]], [[1.0]]], (32, len(stages), len(head_of(model).judgement)))
            seen = np.concatenate([seen, said], axis=2)  # whose mean is 0, and deviation 1
        width = len(stages) + 1 + seen.shape[2]
    torch.manual_seed(seed)
    encoder = {"channels": 5, "token_width": embedded.shape[2]} if tokens else {}
    nvec = [2] * len(board) + [len(shares), *[2] * len(answers)]
    network = DecisionPolicy(width, nvec, board.names, stages=stages, **encoder).eval()
    if "_attached" not in vars(model):
        board.remove()
    if tokens:
        begins = (embedded - token_statistics[0]) / token_statistics[1]
        network.token_encoder.standardise_on({"tokens": torch.from_numpy(begins), "mask": looked["attention_mask"]})
    with torch.no_grad():
        network.head.weight.mul_(20)
        if dense:
            network.head.weight.zero_()
            network.head.bias[: 2 * len(board.names) : 2] = 1
    rarity = np.linspace(0, 1, 41) if ranking == "idf" else None
    card = {
        "env": {
            "tokens": {"shares": shares, "ranking": ranking},
            "backbone": {"max_source_length": 12},
            "data": {"unanswerable": True},
        },
        "backbone": {
            "name": "tiny",
            "model_type": model.config.model_type,
            "weights": weights_hash(model),
            "token_types": False,
        },
    }
    protection = TokenRule((1, 2, 3), 1, 0, None) if len(shares) > 1 else None
    standards = seen.mean(axis=0), seen.std(axis=0)
    return SkipPolicy(network, *standards, rarity, protection, (), card, token_statistics, ranking == "attention")


@pytest.fixture
def model(tmp_path, tiny_tokenizer):
    *_, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    return sd_gym.load(tmp_path / "artefact"), texts


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file, rows):
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def cut_off(model, source, output, *, after=10, chunk=5):
    """A run that ends after so many rows; its part."""

    def cut(rows, bulk):
        if rows >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_file(model, source, output, chunk=chunk, on_chunk=cut)
    assert not output.exists()
    return output.with_name(output.name + ".part")


def everything(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}
