"""Decisions share the passes that they have in common."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from sd_gym.backbones.heads.seq2seq import judged_text, until_end
from sd_gym.envs.actions import all_decisions
from sd_gym.execution.mask_tree import MaskTree
from sd_gym.execution.passes import columns
from sd_gym.switch import Switchboard
from tests.conftest import ENCODER, make_inputs, make_model
from tests.devices import MPS, Devices, place
from tests.envs.conftest import SMALL
from tests.switch.conftest import logits


@pytest.mark.parametrize("num_beams", [1, 2])
def test_masks_that_agree_on_the_encoder_share_its_pass_where_texts_are_generated(num_beams):
    settings = {"quality": "metric", "metric": "rouge", "num_beams": num_beams, "token_shares": [0.0, 0.2]}
    core = gym.make("SD/Summarization-Mini-v0", **SMALL, **settings).unwrapped.core
    split, rows = core.split("test"), np.arange(8)
    masks = np.zeros((5, len(core.nvec)), dtype=np.int64)
    masks[1:3, -3] = masks[2, -2] = 1  # these three differ in the last decoder layer alone
    masks[3:, -1] = masks[4, 2] = 1  # these two drop tokens, and differ in the encoder
    encoder = []
    core.backbone.model.base_model.encoder.layers[0].fc1.register_forward_hook(lambda *_: encoder.append(1))
    texts = split.passes.generated_under_all(rows, masks)
    assert len(encoder) == 3
    assert texts == [split.passes.answers(rows, np.tile(mask, (8, 1))) for mask in masks]
    found = split.scoring.under_all(rows, masks)
    alone = [split.scoring.quality_and_likelihood(rows, np.tile(mask, (8, 1))) for mask in masks]
    for values, expected in zip(found, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(values, np.stack(expected, axis=1), rtol=1e-5)


@pytest.mark.parametrize(("shares", "attentions"), [([0.0], 1 + 4 + 16), ([0.0, 0.5], 3 * (1 + 4 + 16))])
def test_all_masks_share_every_prefix(shares, attentions, settings):
    """Sublayer by sublayer; where tokens are dropped, layer by layer. A head that reads one position needs one."""
    core = gym.make("SD/Classification-Custom-v0", **settings, token_shares=shares).unwrapped.core
    split, rows, masks = core.split("train"), np.arange(5), all_decisions(core.nvec)
    runs = {"attention.self.query": [], "output.dense": []}
    hooks = [
        layer.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: runs[name].append(args[0].shape)
        )
        for layer in core.backbone.model.bert.encoder.layer
        for name in runs
    ]
    found = split.scoring.under_all(rows, masks)
    for hook in hooks:
        hook.remove()
    assert len(runs["attention.self.query"]) == attentions
    if len(shares) == 1:
        assert len(masks) - 1 == 63 == sum(map(len, runs.values()))
        assert sum(shape[1] == 1 for shape in runs["output.dense"]) == 32  # the last layer's
    every = np.repeat(rows, len(masks)), np.tile(masks, (len(rows), 1))
    alone = split.scoring.quality_and_likelihood(*every)
    for values, expected in zip(found, alone, strict=True):
        np.testing.assert_allclose(values.ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ENCODER)
@torch.inference_mode()
def test_a_tree_of_masks_gives_the_logits_of_each_mask_alone(name):
    """Also where norms run that no mask skips: each of them runs once."""
    model, inputs, found = make_model(name), make_inputs(name, batch=2), dict[int, torch.Tensor]()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.weight.uniform_(0.5, 2.0)  # one that is untrained changes nothing if it runs twice
    board = Switchboard(model)
    backbone = SimpleNamespace(board=board, logits=lambda given: model(**given).logits)
    masks = all_decisions([2] * len(board))
    MaskTree(backbone, inputs, None, masks, found.__setitem__).run_masks(np.arange(len(masks)))
    for number, mask in enumerate(masks):
        torch.testing.assert_close(found[number], logits(board, mask[None], inputs), rtol=1e-4, atol=1e-5)


def test_a_device_without_float64_gives_the_values_of_the_cpu(settings):
    core = gym.make("SD/Classification-Custom-v0", **settings).unwrapped.core
    passes, rows = core.split("train").passes, np.arange(4)
    decisions = np.random.default_rng(0).integers(2, size=(4, len(core.mask_nvec)))
    decisions[:, -1] = 0

    def values():
        likelihood = columns(passes.head.likelihood)
        seen = passes.state_at("encoder.1", rows, decisions)
        return [
            passes.under_all(rows, decisions, likelihood),
            passes.in_passes(rows, decisions, likelihood),
            passes.in_passes(rows, decisions, likelihood, seen),
            passes.confidence_at(seen, rows, decisions),
        ]

    expected = values()
    with Devices():
        place(core.backbone.model, MPS)
        assert passes.inputs(rows)["input_ids"].device == MPS
        found = values()
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, wanted)


@torch.inference_mode()
def test_texts_are_judged_on_a_device_without_float64():
    model, inputs = make_model("bart"), make_inputs("bart")
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    output = model.generate(**given, max_new_tokens=3, num_beams=1, return_dict_in_generate=True, output_scores=True)
    lengths, _ = until_end(output.sequences[:, 1:], model.generation_config.eos_token_id)
    expected = judged_text(model, output, lengths)
    with Devices():
        place(model, MPS)
        output.sequences, output.scores = output.sequences.to(MPS), tuple(score.to(MPS) for score in output.scores)
        assert torch.equal(judged_text(model, output, lengths.to(MPS)), expected)
