"""A backbone that is broken is refused when it is loaded, and the error says what to do."""

import copy
import json
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file

import sd_gym  # noqa: F401  (registers the ids)
from sd_gym.backbones.checks import BackboneError
from sd_gym.backbones.heads import LabelHead, SpanHead
from sd_gym.backbones.load import BUNDLED, load_model, save_backbone
from tests.backbones.conftest import change_config, change_weights
from tests.conftest import DECODER, ENCODER, ENCODER_DECODER, make_extractor, make_model, save, small_disk


@pytest.mark.parametrize("name", ["bart", "mbart", "pegasus", "marian", "t5", "gpt2", "llama", "qwen2", "bert"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, name):
    make_model(name).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"tokenizer .*expected (its files|them) beside the weights"):
        load_model(str(tmp_path))


def test_a_tokenizer_that_loads_but_cannot_be_used_is_refused(tmp_path):
    folder = shutil.copytree(BUNDLED["mini"], tmp_path / "mini")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BackboneError, match="its tokenizer cannot be loaded"):
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
    save(model, tiny_tokenizer, tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    if name not in ("pegasus", "marian"):  # which have no head that classifies
        assert load_model(str(tmp_path), head=LabelHead, num_labels=3)[0].config.num_labels == 3
    if name in ENCODER:
        load_model(str(tmp_path), head=SpanHead)
        make_extractor(name).save_pretrained(tmp_path)
        load_model(str(tmp_path))
        assert load_model(str(tmp_path), head=LabelHead, num_labels=3)[0].config.num_labels == 3


def test_a_folder_with_several_chat_templates_is_saved_again(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "[SEP]"
    for further in ("tools", "documents"):
        tokenizer.chat_template = {"default": "a", further: "b"}
        save_backbone(make_model("llama"), tokenizer, tmp_path)
        (folder,) = (file for file in tmp_path.iterdir() if file.is_dir())
        assert folder.stat().st_mode & stat.S_IXUSR  # without it, only root can read what is in it
        assert load_model(str(tmp_path))[1].chat_template == tokenizer.chat_template


def test_a_model_that_does_not_fit_on_the_disk_leaves_nothing_there(tmp_path, tiny_tokenizer):
    with (
        small_disk(1000),
        pytest.raises(OSError, match=rf"(File too large|cannot write the model to {tmp_path} .*full\?)"),
    ):
        save_backbone(make_model("bert"), tiny_tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


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


def test_code_in_a_folder_is_never_run_and_the_user_is_not_asked(folder, monkeypatch):
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(BackboneError, match=r"cannot be read"):
        load_model(str(folder))
    assert not marker.exists()


def test_a_folder_without_config_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*save_pretrained"):
        load_model(str(tmp_path))
