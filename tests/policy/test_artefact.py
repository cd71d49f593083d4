"""Files that hold a policy, and those that do not."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

import sd_gym
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.card import OperatingPoint, write_card
from tests.conftest import make_model
from tests.envs.conftest import trained
from tests.inference.conftest import make_policy


def test_what_is_no_artefact_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(FileNotFoundError, match="expected one with skip_policy"):
        sd_gym.SkipPolicy.from_pretrained(tmp_path / "nowhere")
    *_, artefact, _ = trained("classification", "idf", tmp_path, tiny_tokenizer)
    assert repr(artefact).startswith("SkipPolicy(SD/Classification-Custom-v0 on ")
    assert len(repr(artefact).replace(str(tmp_path), "").splitlines()[0]) < 100
    folder = tmp_path / "artefact"
    card = json.loads((folder / "skip_policy.json").read_text())
    del card["files"], card["format"]
    for change, message in (
        ({"operating_points": [{"margin": 0}]}, r"skip_policy\.json: not the card of a policy.*: operating_points.0"),
        ({"protection": {"special": [1]}}, r"skip_policy\.json: not the card of a policy.*: protection.first"),
        ({"env": {**card["env"], "tokens": {"shares": [0.0], "ranking": "idf"}}}, "2 token levels"),
    ):
        write_card(folder, {**card, **change})
        with pytest.raises(ValueError, match=message):
            sd_gym.SkipPolicy.from_pretrained(folder)
    artefact.save_pretrained(folder)
    model = sd_gym.load(folder)
    with pytest.raises(ValueError, match="put it in a list"):
        model("good food")
    with pytest.raises(ValueError, match="input 1: expected text and text_pair"):
        model(["good food", 3])
    assert model([]) == []
    sd_gym.detach(model.model)


def test_a_tokenizer_with_the_words_that_reads_otherwise_is_refused(tmp_path, tiny_tokenizer):
    _, _, policy, _ = trained("classification", None, tmp_path, tiny_tokenizer)
    own = PreTrainedTokenizerFast.from_pretrained(policy.card["backbone"]["name"])
    policy.check_tokenizer(own)
    words, case = copy.deepcopy(own), copy.deepcopy(own)
    words.add_tokens(["other"])
    with pytest.raises(ValueError, match=r"the tokenizer is not the one of .* \(hash"):
        policy.check_tokenizer(words)
    case.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"has the words of .*, but reads case, accents or spaces otherwise"):
        policy.check_tokenizer(case)
    backbone = {key: value for key, value in policy.card["backbone"].items() if key != "reading"}
    replace(policy, card={**policy.card, "backbone": backbone}).check_tokenizer(case)  # a policy of before


def test_the_dial_takes_a_version_that_passed_its_test():
    policy = make_policy(make_model("bert"))
    operating_points = (
        OperatingPoint(-1.0, 0.02, 0.03, 0.2, False),
        OperatingPoint(0.0, 0.002, 0.004, 0.5, True),
        OperatingPoint(1.0, 0.0, 0.006, 0.7, True),
        OperatingPoint(2.0, 0.0, 0.001, 0.9, True),
    )
    policy = SkipPolicy(**{**vars(policy), "operating_points": operating_points})
    assert policy.at() is policy
    bias = policy.network.head.bias[0].item()

    def margin(**asked):
        return pytest.approx(policy.at(**asked).network.head.bias[0].item() - bias, abs=1e-5)

    assert margin(max_loss=0.006) == 0
    assert margin(max_loss=0.005) == 2  # what comes after a point that may lose more is not asked
    assert margin(max_loss=0.03) == -1
    assert margin(max_flops=0.9) == 2
    assert margin(max_flops=0.6) == 0
    with pytest.raises(ValueError, match=r"max_flops=0.4; there are: 20% of the FLOPs, .* lost \(not passed\)"):
        policy.at(max_flops=0.4)
    with pytest.raises(ValueError, match="got both"):
        policy.at(max_flops=0.5, max_loss=0.1)
    shyer = policy.at(max_loss=0.001)
    assert [point.margin for point in shyer.operating_points] == [-3.0, -2.0, -1.0, 0.0]  # it can be turned back


def test_a_repository_without_a_namespace_is_the_users(tmp_path, tiny_tokenizer, monkeypatch):
    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, *, repo_id, **_):
            return SimpleNamespace(commit_url=repo_id)

    monkeypatch.setattr("sd_gym.policy.artefact.HfApi", Hub)
    *_, artefact, _ = trained("classification", None, tmp_path, tiny_tokenizer)
    assert artefact.push_to_hub("reviews") == "me/reviews"
