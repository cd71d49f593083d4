"""A backbone that is broken is refused when it is loaded, and the error says what to do."""

import json
import shutil

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_gym  # noqa: F401  (registers the ids)
from sd_gym.backbones.checks import BackboneError, positions_of, usable_device
from sd_gym.backbones.heads import LabelHead, SpanHead
from sd_gym.backbones.load import load_backbone, load_model
from tests.conftest import DECODER, ENCODER, ENCODER_DECODER, TINY, make_extractor, make_model


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


@pytest.mark.parametrize("name", ["bart", "mbart", "pegasus", "marian", "t5", "gpt2", "llama", "qwen2", "bert"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, name):
    make_model(name).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"tokenizer .*expected (its files|them) beside the weights"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("key", ["classifier.weight", "bert.encoder.layer.1.output.dense.weight"])
def test_missing_weights_are_refused(folder, key):
    change_weights(folder, lambda weights: weights.pop(key))
    with pytest.raises(BackboneError, match=rf"1 weights .* are missing or of another size, such as '{key}'"):
        load_model(str(folder))


def test_only_a_head_that_is_asked_for_may_be_new_and_it_is_seeded(folder):
    change_weights(folder, lambda weights: weights.pop("classifier.weight"))
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load_model(str(folder), head=LabelHead, num_labels=4)[0].classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    change_weights(folder, lambda weights: weights.pop("bert.encoder.layer.1.output.dense.weight"))
    with pytest.raises(BackboneError, match=r"such as 'bert\.encoder\.layer\.1"):
        load_model(str(folder), head=LabelHead, num_labels=4)


@pytest.mark.parametrize("name", ENCODER_DECODER + DECODER + ENCODER)
def test_every_architecture_loads_as_saved_and_with_new_heads(tmp_path, name, tiny_tokenizer):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    if name not in ("pegasus", "marian"):  # which have no head that classifies
        assert load_model(str(tmp_path), head=LabelHead, num_labels=3)[0].config.num_labels == 3
    if name in ENCODER:
        load_model(str(tmp_path), head=SpanHead)
        make_extractor(name).save_pretrained(tmp_path)
        load_model(str(tmp_path))
        assert load_model(str(tmp_path), head=LabelHead, num_labels=3)[0].config.num_labels == 3


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
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"tokens up to number 12, but the model has only 12 embeddings"):
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
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 1000}))
    settings = {"dataset": str(reviews), "backbone": str(tmp_path)}
    with pytest.raises(BackboneError, match="has 40 positions, but max_source_length is 128; set it to 40 or less"):
        gym.make("SD/Classification-Custom-v0", **settings).reset()
    gym.make("SD/Classification-Custom-v0", max_source_length=40, **settings).reset()


def test_weights_as_a_pickle_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"as pickles only .* can run code .* save_pretrained\(\)"):
        load_model(str(folder))


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_garbage_and_cut_off_files_are_refused_in_one_line(folder, file, content):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BackboneError, match=f"the backbone '{folder}'") as caught:
        load_model(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_a_gguf_file_of_garbage_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"x" * 100)
    with pytest.raises(BackboneError, match=r"model\.gguf cannot be read"):
        load_model(str(tmp_path / "model.gguf"))


def test_code_in_a_folder_is_never_run_and_nobody_is_asked(folder, monkeypatch):
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(BackboneError, match=r"cannot be read"):
        load_model(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"cannot use the device '{device}': expected 'cpu'"):
        usable_device(device)
    with pytest.raises(ValueError, match="cannot use the device"):
        load_backbone("mini", device)


def test_a_folder_without_config_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*save_pretrained"):
        load_model(str(tmp_path))
