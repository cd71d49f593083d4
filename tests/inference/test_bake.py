"""A static mask made part of a model: the layers that it skips are gone, and nothing else has changed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import sd_gym
from sd_gym.switch import Switchboard
from tests.conftest import DECODER, ENCODER, ENCODER_DECODER, make_extractor, make_inputs, make_model
from tests.inference.conftest import make_policy

POST_NORM = {"bart", "marian", "distilbert"}
BAKED = [name for name in (*ENCODER, *DECODER, *ENCODER_DECODER) if name not in POST_NORM]


def whole_layers(board, *places):
    """The mask that skips whole layers, each given as (stack, index)."""
    return np.array([(switch.stack, switch.index) in places for switch in board.switches], dtype=int)


def masks(board):
    """Each layer skipped by itself, and of stacks of three layers the first two."""
    places = sorted({(switch.stack, switch.index) for switch in board.switches})
    yield from (whole_layers(board, place) for place in places)
    if ("encoder", 2) in places or ("decoder", 2) in places:
        yield whole_layers(board, places[0], places[1])
    if len({stack for stack, _ in places}) > 1:
        yield whole_layers(board, ("encoder", 0), ("decoder", 0))


@torch.inference_mode()
def outputs(model, name):
    inputs = make_inputs(name)
    logits = model(**inputs).logits
    if name in ENCODER:
        return logits, torch.zeros(1)
    side = "left" if name in DECODER else "right"
    prompts = {key: value for key, value in make_inputs(name, side=side).items() if key.endswith(("ids", "mask"))}
    prompts.pop("decoder_input_ids", None)
    return logits, model.generate(**prompts, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("name", BAKED)
def test_it_is_the_switched_model_bit_for_bit_and_transformers_alone_loads_it(name, tmp_path):
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    board = Switchboard(model)
    for number, mask in enumerate(masks(board)):
        if name == "t5" and mask[: len(mask) // 2].any() and not mask[len(mask) // 2 :].any():
            continue  # see below
        with board.decide(mask[None]):
            wanted = outputs(model, name)
        smaller = sd_gym.bake(model, mask)
        assert type(smaller) is type(model)
        assert smaller.num_parameters() < model.num_parameters()
        smaller.save_pretrained(tmp_path / str(number))
        for one in (smaller, type(model).from_pretrained(tmp_path / str(number)).eval()):
            for came, of_switched in zip(outputs(one, name), wanted, strict=True):
                assert torch.equal(came, of_switched)
        assert "_switchboard" not in vars(smaller)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_that_stay_in_float32_do_so():
    """In half precision those of a T5 would overflow."""
    model = make_model("t5").half()
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    board = Switchboard(model)
    mask, inputs = whole_layers(board, ("decoder", 0)), make_inputs("t5")
    smaller = sd_gym.bake(model, mask)
    assert smaller.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
    with torch.inference_mode(), board.decide(mask[None]):
        assert torch.equal(model(**inputs).logits, smaller(**inputs).logits)


@pytest.mark.parametrize("name", sorted(POST_NORM))
def test_layers_in_which_something_always_runs_are_not_taken_out(name):
    model = make_model(name)
    board = Switchboard(model)
    with pytest.raises(ValueError, match="a norm after each residual sum runs even where all is skipped"):
        sd_gym.bake(model, next(masks(board)))
    same = sd_gym.bake(model, np.zeros(len(board)))  # nothing is skipped
    assert torch.equal(outputs(same, name)[0], outputs(model, name)[0])


def test_a_t5_keeps_as_many_layers_in_its_encoder_as_in_its_decoder():
    model = make_model("t5")
    board = Switchboard(model)
    with pytest.raises(ValueError, match=r"its decoder \(2 layers\) needs at least as many"):
        sd_gym.bake(model, whole_layers(board, ("encoder", 0)))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_other_heads(name):
    model = make_extractor(name)
    board = Switchboard(model)
    mask = whole_layers(board, ("encoder", 1))
    inputs = make_inputs(name)
    with torch.inference_mode():
        with board.decide(mask[None]):
            wanted = model(**inputs).start_logits
        assert torch.equal(sd_gym.bake(model, mask)(**inputs).start_logits, wanted)


def test_of_an_attached_model_too():
    model = make_model("bert")
    sd_gym.attach(model, make_policy(model))
    mask = whole_layers(model._switchboard, ("encoder", 1))
    smaller = sd_gym.bake(model, np.append(mask, 0))
    with model._switchboard.decide(mask[None]):
        wanted = outputs(model, "bert")[0]
    assert torch.equal(outputs(smaller, "bert")[0], wanted)
    assert len(smaller.bert.encoder.layer) == 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0, 0, 0, 0, 0], r"a part of encoder layers \[0\] only"),
        ([1] * 6, "all layers of the encoder"),
        ([0] * 5, r"expected a mask of 6 switches.*got \[5\]"),
        ([0, 0, 2, 2, 0, 0], "each 0 or 1"),
        ([0, 0, 1, 1, 0, 0, 1], "drops tokens"),
    ],
)
def test_a_mask_that_cannot_be_baked_is_refused(mask, message):
    model = make_model("bert")
    with pytest.raises(ValueError, match=message):
        sd_gym.bake(model, mask)
    assert "_switchboard" not in vars(model)


def test_attentions_scaled_by_their_number_stay_where_they_are():
    model = make_model("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="scaled by their number"):
        sd_gym.bake(model, [1, 1, 0, 0, 0, 0])


def test_what_was_baked_needs_no_sd_gym(tmp_path):
    sd_gym.bake(make_model("llama"), [0, 0, 1, 1, 0, 0]).save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "assert 'sd_gym' not in sys.modules; print(len(model.model.layers))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"
