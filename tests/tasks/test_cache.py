"""Encoded data on disk: read as they were written, made again when anything about them changes."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd_gym.backbones.heads import LabelHead, Seq2SeqHead, SpanHead
from sd_gym.config import BackboneConfig
from sd_gym.data.instance import Instance, NamedClass
from sd_gym.tasks import cache
from sd_gym.tasks.cache import encode_cached
from sd_gym.tasks.encoding import encode

SETTINGS = (SpanHead(), BackboneConfig(name="tiny", max_source_length=9, max_target_length=4))
HEADS = [SpanHead(), Seq2SeqHead(), LabelHead({"0": 0, "1": 1, "good": 0, "": 1})]
INSTANCES = [
    Instance("a", "the food", "good", 0, "the food was good", ((0, 8),), ("food was good",), ((13, 17),)),
    Instance("b", "the room", "", 0, "not awful", ((0, 8),)),
]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("SD_GYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 2)
    return tmp_path / "cache"


def same(one, other):
    for field in dataclasses.fields(one):
        first, second = getattr(one, field.name), getattr(other, field.name)
        assert type(first) is type(second), field.name
        if first is not None:
            assert first.dtype == second.dtype, field.name
            assert np.array_equal(np.asarray(first), np.asarray(second)), field.name


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_what_is_read_is_what_was_encoded(head, tiny_tokenizer, monkeypatch):
    instances = [dataclasses.replace(one, target=n) for n, one in enumerate(INSTANCES)]
    instances = instances if head.name == "label" else INSTANCES
    settings = (head, SETTINGS[1])
    fresh = encode(instances, tiny_tokenizer, *settings)
    same(fresh, encode_cached(instances, tiny_tokenizer, *settings))
    monkeypatch.setattr(cache, "encode", None)  # it is not called again
    same(fresh, encode_cached(instances, tiny_tokenizer, *settings))


def test_everything_that_matters_makes_another_file(small, tiny_tokenizer):
    def files():
        encode_cached(instances, tiny_tokenizer, *settings)
        return len(list(small.iterdir()))

    instances, settings = list(INSTANCES), SETTINGS
    assert [files(), files()] == [1, 1]
    settings = (settings[0], settings[1].model_copy(update={"max_source_length": 8}))
    assert files() == 2
    instances[1] = dataclasses.replace(INSTANCES[1], source_pair="not bad")
    assert files() == 3
    instances[0] = dataclasses.replace(INSTANCES[0], answer_spans=((9, 17),))
    assert files() == 4
    tiny_tokenizer("the food", "the food", truncation=True, max_length=3)  # leaves its state in the tokenizer
    assert files() == 4
    for attribute, value in (("truncation_side", "left"), ("pad_token", "the"), ("eos_token", "bad")):
        before = getattr(tiny_tokenizer, attribute), files()
        setattr(tiny_tokenizer, attribute, value)
        try:
            assert files() == before[1] + 1, attribute
        finally:
            setattr(tiny_tokenizer, attribute, before[0])


def test_names_of_classes_count(tiny_tokenizer):
    """A model is asked for the class of that name."""
    head, backbone = LabelHead({"no": 0, "yes": 1}), SETTINGS[1]
    for names, expected in ((("no", "yes"), [0, 1]), (("yes", "no"), [1, 0])):
        instances = [Instance(str(n), "the food", NamedClass.of(n, names)) for n in range(2)]
        assert encode_cached(instances, tiny_tokenizer, head, backbone).labels.tolist() == expected


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_the_side_of_truncation_counts(head, tiny_tokenizer):
    instances = [dataclasses.replace(one, source_pair=None, protected=()) for one in INSTANCES]
    instances = INSTANCES if head.name == "span" else instances
    limit = 7 if head.name == "span" else 3
    settings = (head, BackboneConfig(name="tiny", max_source_length=limit, max_target_length=3))
    right = encode_cached(instances, tiny_tokenizer, *settings)
    tiny_tokenizer.truncation_side = "left"
    try:
        left = encode_cached(instances, tiny_tokenizer, *settings)
        same(left, encode(instances, tiny_tokenizer, *settings))
    finally:
        tiny_tokenizer.truncation_side = "right"
    assert not torch.equal(left.input_ids, right.input_ids)


@pytest.mark.parametrize("change", ["lengths", "labels", "rows", "foreign", "renamed"])
def test_a_file_of_other_lengths_or_labels_is_not_used(change, small, tiny_tokenizer):
    fresh = encode_cached(INSTANCES, tiny_tokenizer, *SETTINGS)
    (file,) = small.iterdir()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    if change == "lengths":
        tensors["source_length"] += 1
    if change == "labels":
        tensors["labels"] = tensors["labels"].flip(0)
    if change == "rows":
        tensors = {name: tensor[:1] for name, tensor in tensors.items()}
    if change == "foreign":
        tensors = {"x": torch.zeros(1)}
    if change == "renamed":  # whole, but of other texts
        other = [dataclasses.replace(one, source="was good") for one in INSTANCES]
        encode_cached(other, tiny_tokenizer, *SETTINGS)
        (another,) = set(small.iterdir()) - {file}
        another.replace(file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)
    same(fresh, encode_cached(INSTANCES, tiny_tokenizer, *SETTINGS))


def test_a_broken_or_unwritable_cache_does_no_harm(small, tiny_tokenizer, tmp_path, monkeypatch):
    fresh = encode_cached(INSTANCES, tiny_tokenizer, *SETTINGS)
    (file,) = small.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    same(fresh, encode_cached(INSTANCES, tiny_tokenizer, *SETTINGS))
    assert torch.equal(load_file(file)["labels"].long(), fresh.labels)
    (tmp_path / "no-folder").write_text("a file is in the way")
    monkeypatch.setenv("SD_GYM_CACHE", str(tmp_path / "no-folder"))
    same(fresh, encode_cached(INSTANCES, tiny_tokenizer, *SETTINGS))


def test_without_a_home_there_is_no_cache(small, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("SD_GYM_CACHE")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    encode_cached(INSTANCES, tiny_tokenizer, *SETTINGS)
    assert {*tmp_path.iterdir()} == before


def test_another_language_of_the_targets_is_another_key(tiny_tokenizer):
    keys = set()
    for language in (None, "de_DE", "fr_XX"):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.tgt_lang = language
        keys.add(cache._key(INSTANCES, tokenizer, {}))
    assert len(keys) == 3
