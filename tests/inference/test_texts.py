"""A policy that was loaded answers texts."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import sd_gym
from sd_gym.backbones import load
from sd_gym.tasks import cache
from tests.backbones.conftest import change_weights
from tests.conftest import save
from tests.envs.conftest import trained
from tests.serving.test_engine import few_masks


def test_who_loads_owns_its_model(tmp_path, tiny_tokenizer):
    """Neither another load nor an env of the process runs under a policy that was loaded."""
    core, _, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    every, split = np.arange(24), core.split("test")
    model = core.backbone.model
    before = model(**split.encoded.inputs(every, model.device)).logits
    first, second = sd_gym.load(artefact), sd_gym.load(artefact.with_margin(-3.0))
    alone = [one.skip for one in first(texts)]
    assert sum(map(sum, alone)) < sum(sum(one.skip) for one in second(texts))
    inputs = {name: split.passes.inputs(every)[name] for name in ("input_ids", "attention_mask")}
    first.model(**inputs)
    np.testing.assert_array_equal(first.model.decisions.skip, alone)
    assert torch.equal(model(**split.encoded.inputs(every, model.device)).logits, before)
    sd_gym.detach(first.model)
    sd_gym.detach(second.model)  # which has a policy of its own


@pytest.mark.parametrize("dense", [False, True])
def test_no_more_rows_run_together_than_asked_for(model, dense):
    model, texts = model
    sizes = []
    layer = model.model.base_model.encoder.layer[0].attention.self  # deciding, which embeds all of them, ends before it
    handle = layer.register_forward_hook(lambda _, args, output: sizes.append(len(output[0])))
    wanted = model(texts, dense=dense)
    together, sizes[:] = max(sizes), []
    came = model(texts, dense=dense, batch_size=5)
    handle.remove()
    assert together > 5
    assert 1 <= max(sizes) <= 5
    assert [one.answer for one in came] == [one.answer for one in wanted]
    np.testing.assert_array_equal([one.skip for one in came], [one.skip for one in wanted])


def test_a_text_is_read_alike_beside_pairs_of_texts(model):
    model, texts = model
    pairs = [(text, "the food was good") for text in texts]
    alone, together = model(texts) + model(pairs), model([*texts, *pairs])
    assert [one.answer for one in together] == [one.answer for one in alone]
    np.testing.assert_array_equal([one.skip for one in together], [one.skip for one in alone])
    np.testing.assert_array_equal([one.flops_ratio for one in together], [one.flops_ratio for one in alone])


def test_an_empty_second_text_is_none(model):
    model, texts = model
    (wanted,) = model(texts[:1])
    for empty in ((texts[0], ""), (texts[0], " \n"), {"text": texts[0], "text_pair": ""}):
        assert model([empty])[0].answer == wanted.answer
    with pytest.raises(ValueError, match="expected text and text_pair"):
        model([("", "")])


def test_weights_that_were_checked_are_not_hashed_again(tmp_path, tiny_tokenizer, monkeypatch):
    core, *_, artefact, _ = trained("classification", None, tmp_path, tiny_tokenizer)
    hashed = []
    hash_of_tensors = load.hash_of_tensors
    monkeypatch.setattr(load, "hash_of_tensors", lambda tensors: hashed.append(1) or hash_of_tensors(tensors))
    for number, checks in enumerate((True, False), start=1):
        assert sd_gym.load(artefact, check_weights=checks).fingerprints["backbone"] == core.backbone.weights
        assert len(hashed) == number


def test_a_policy_that_agreed_with_dense_runs_nothing_densely(tmp_path, tiny_tokenizer):
    """Its env makes the references of dense answers; here nobody asks for references."""
    _, _, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    card = deepcopy(artefact.card)
    card["env"]["quality"]["kind"] = "agreement"
    passes = []
    for one in (artefact, replace(artefact, card=card)):
        model = sd_gym.load(one)
        layer = model.model.base_model.encoder.layer[0]
        handle = layer.register_forward_hook(lambda *_: passes.append(1))
        model(texts[:4])
        handle.remove()
        passes.append(0)
    assert passes[: passes.index(0) + 1] == passes[passes.index(0) + 1 :]


def test_what_is_answered_is_kept_in_no_cache(model, tmp_path, monkeypatch):
    model, texts = model
    monkeypatch.setattr(cache, "SMALLEST", 1)
    monkeypatch.setenv("SD_GYM_CACHE", str(tmp_path / "cache"))
    model(texts)
    assert not (tmp_path / "cache").exists()


def test_a_policy_that_decides_in_the_pass_is_not_compiled(tmp_path, tiny_tokenizer):
    *_, artefact, _ = trained("classification", None, tmp_path, tiny_tokenizer, stages=("first", "encoder.1"))
    with pytest.raises(ValueError, match=r"this decides at first, encoder\.1: leave it out"):
        sd_gym.load(artefact, compile=True)


@pytest.mark.parametrize("task", ["classification", "extracted"])
def test_compiled_models_go_on_as_the_others_do(task, tmp_path, tiny_tokenizer, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    *_, artefact, texts = trained(task, None, tmp_path, tiny_tokenizer, stages=("first", "answer"))
    policy = few_masks(artefact)
    compiled, model = sd_gym.load(policy, compile=True), sd_gym.load(policy)
    dense = model(texts, dense=True)
    for inputs in (texts, texts[:1], texts[-1:]):
        wanted, came = model(inputs), compiled(inputs)
        assert [one.answer for one in came] == [one.answer for one in wanted]
        assert [one.went_on for one in came] == [one.went_on for one in wanted]
        np.testing.assert_array_equal([one.skip for one in came], [one.skip for one in wanted])
        for one, eager in zip(came, wanted, strict=True):
            assert one.flops_ratio >= eager.flops_ratio if one.went_on else one.flops_ratio == eager.flops_ratio
            assert one.flops_ratio > 1 or not one.went_on
    answers = model(texts)
    assert 0 < sum(one.went_on for one in answers) < len(texts)
    assert all(one.answer == right.answer for one, right in zip(answers, dense, strict=True) if one.went_on)
    masks = {tuple(one.skip) for one in answers}
    assert 1 < len(masks) <= counter.frame_count <= 2 * (1 + len(masks))


@torch._dynamo.config.patch(recompile_limit=1)  # usually 8, and all masks count together
def test_each_mask_is_compiled_once_for_single_inputs_and_once_for_batches(tmp_path, tiny_tokenizer, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    core, policy, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    with pytest.raises(ValueError, match="decides otherwise; sd-gym reduce"):
        sd_gym.load(artefact, compile=True)
    few = replace(artefact, network=policy.reduced(3, core.observe(core.split("train"), np.arange(24))))
    wanted, compiled = sd_gym.load(few)(texts), sd_gym.load(few, compile=True)
    for inputs in ([text + " fine" for text in texts], texts[:7], texts):
        came = compiled.answers(inputs)
    assert [one.answer for one in came] == [one.answer for one in wanted]
    masks = {tuple(one.skip) for one in wanted}
    assert 1 < len(masks) <= counter.frame_count <= 2 * len(masks)


@pytest.mark.parametrize(
    ("task", "stages"), [("classification", ("first",)), ("extracted", ("first", "encoder.1", "answer"))]
)
def test_in_bfloat16_the_policy_decides_in_float32(task, stages, tmp_path, tiny_tokenizer):
    core, _, artefact, texts = trained(task, None, tmp_path, tiny_tokenizer, stages=stages)
    model, observed = sd_gym.load(artefact, dtype="bfloat16"), []
    artefact.network.register_forward_pre_hook(lambda network, shown: observed.append(shown[0].dtype))
    came, wanted = model(texts), sd_gym.load(artefact)(texts)
    assert model.model.dtype == torch.bfloat16
    assert set(observed) == {torch.float32}
    first = slice(0, 2 if len(stages) > 1 else 6)  # switches that are decided before anything is rounded
    np.testing.assert_array_equal([one.skip[first] for one in came], [one.skip[first] for one in wanted])
    assert model.fingerprints["backbone"] != core.backbone.weights
    with pytest.raises(ValueError, match="expected dtype to be one of float32, bfloat16, float16, got 'int8'"):
        sd_gym.load(artefact, dtype="int8")


@pytest.mark.parametrize(("task", "dtype"), [("prompted", "bfloat16"), ("answered", "float16")])
def test_a_model_in_half_precision_keeps_in_float32_what_transformers_does(task, dtype, tmp_path, tiny_tokenizer):
    """As rotary frequencies, and a projection of T5; of all weights it is as transformers loads it."""
    core, _, artefact, texts = trained(task, None, tmp_path, tiny_tokenizer)
    model = sd_gym.load(artefact, dtype=dtype)
    wanted = type(core.backbone.model).from_pretrained(tmp_path / "backbone", dtype=dtype)
    tensors = [dict([*one.named_parameters(), *one.named_buffers()]) for one in (model.model, wanted)]
    assert tensors[0].keys() == tensors[1].keys()
    kinds = {tensor.dtype for tensor in tensors[1].values()}
    assert {getattr(torch, dtype), torch.float32} <= kinds
    for name, tensor in tensors[1].items():
        assert tensors[0][name].dtype == tensor.dtype
        assert torch.equal(tensors[0][name], tensor)
    assert len(model(texts)) == len(texts)


def test_weights_are_checked_as_they_are_stored(tmp_path, tiny_tokenizer):
    *_, artefact, _ = trained("classification", None, tmp_path, tiny_tokenizer)
    sd_gym.load(artefact, dtype="bfloat16")
    change_weights(tmp_path / "backbone", lambda weights: weights["classifier.dense.bias"].add_(1))
    with pytest.raises(ValueError, match="the weights are not those"):
        sd_gym.load(artefact, dtype="bfloat16")
    assert sd_gym.load(artefact, dtype="bfloat16", check_weights=False).model.dtype == torch.bfloat16


def test_a_backbone_in_bfloat16_is_judged_by_evaluate(tmp_path, tiny_tokenizer):
    core, policy, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    half = type(core.backbone.model).from_pretrained(tmp_path / "backbone", dtype=torch.bfloat16)
    save(half, core.backbone.tokenizer, tmp_path / "half")
    settings = {"dataset": str(tmp_path / "data"), "splits": {}, "overlap": "allow", "max_source_length": 26}
    result = sd_gym.evaluate("SD/Classification-Custom-v0", policy, backbone=str(tmp_path / "half"), **settings)
    model = sd_gym.load(artefact, str(tmp_path / "half"), check_weights=False)
    assert model.model.dtype == torch.bfloat16
    shares = [one.flops_ratio for one in model(texts)]
    assert result["flops_ratio_with_policy"] == pytest.approx(np.mean(shares), rel=0.05)
