"""Wrong weights, tokenizers and positions of a backbone are refused on loading."""

import json

import gymnasium as gym
import pytest
import torch

from sd_gym.backbones.checks import BackboneError, has_bf16, positions_of, usable_device
from sd_gym.backbones.heads import LabelHead
from sd_gym.backbones.load import load_backbone, load_model
from tests.backbones.conftest import change_config, change_weights
from tests.conftest import DECODER, ENCODER_DECODER, TINY, make_model, save


@pytest.mark.parametrize("key", ["classifier.weight", "bert.encoder.layer.1.output.dense.weight"])
def test_missing_weights_are_refused(folder, key):
    change_weights(folder, lambda weights: weights.pop(key))
    with pytest.raises(BackboneError, match=rf"1 weights .* are missing or of another size, such as '{key}'"):
        load_model(str(folder))


def test_a_body_of_another_size_is_refused_even_where_the_head_is_new(folder):
    change_config(folder, vocab_size=50)
    with pytest.raises(BackboneError, match=r"another size, such as 'bert\.embeddings\.word_embeddings"):
        load_model(str(folder), head=LabelHead, num_labels=3)


def test_layers_that_config_json_does_not_describe_are_refused(folder):
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(BackboneError, match="describes 2 layers of the encoder, but the weights have 3"):
        load_model(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    change_weights(folder, lambda weights: weights["bert.encoder.layer.0.output.dense.weight"][0].fill_(value))
    with pytest.raises(BackboneError, match=r"1 of its weights hold NaN or infinity, such as 'bert\.encoder\.layer\.0"):
        load_model(str(folder))


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path, tiny_tokenizer):
    model = make_model("bert")
    model.resize_token_embeddings(12)  # the tokenizer's words are 13
    save(model, tiny_tokenizer, tmp_path)
    with pytest.raises(BackboneError, match=r"tokens up to id 12, but the model has only 12 embeddings"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", TINY)
def test_positions_are_those_that_the_model_can_read(name):
    model, positions = make_model(name), positions_of(make_model(name))
    if name == "t5" or (name in DECODER and name != "gpt2"):
        assert positions is None
        return
    inputs = {"input_ids": torch.full((1, positions), 5)}
    if name in ENCODER_DECODER:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    model(**inputs)
    with pytest.raises((IndexError, RuntimeError)):
        model(**{key: torch.full((1, positions + 1), 5) for key in inputs})


def test_too_few_positions_are_refused(tmp_path, reviews, tiny_tokenizer):
    model = make_model("bert")
    save(model, tiny_tokenizer, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 1000}))
    settings = {"dataset": str(reviews), "backbone": str(tmp_path)}
    with pytest.raises(BackboneError, match="has 40 positions, but max_source_length is 128; set it to 40 or less"):
        gym.make("SD/Classification-Custom-v0", **settings).reset()
    gym.make("SD/Classification-Custom-v0", max_source_length=40, **settings).reset()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"cannot use the device '{device}': expected 'cpu'"):
        usable_device(device)
    with pytest.raises(ValueError, match="cannot use the device"):
        load_backbone("mini", device)


@pytest.mark.parametrize(("has", "wanted"), [({}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": False}, False)])
def test_a_processor_computes_in_bfloat16_by_itself_or_not(has, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert has_bf16(torch.device("cpu")) is wanted
