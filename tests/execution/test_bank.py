"""A bank of masks: plain models without what their masks skip, on the weights of one."""

import copy

import numpy as np
import pytest
import torch

import sd_gym
from sd_gym.switch import Switchboard
from tests.conftest import DECODER, ENCODER_DECODER, TINY, make_inputs, make_model
from tests.inference.conftest import make_policy

ASKED_BEFORE = ("bert", "llama", "t5", "bart")


def masks_of(board):
    """Each kind of switch skipped, each layer, all but one layer, all, and some at random."""
    switches = board.switches
    size = len(switches)
    for kind in {switch.sublayer.kind for switch in switches}:
        yield np.array([switch.sublayer.kind == kind for switch in switches])
    for place in sorted({(switch.stack, switch.index) for switch in switches}):
        layer = np.array([(switch.stack, switch.index) == place for switch in switches])
        yield from (layer, ~layer)
    yield np.ones(size, dtype=bool)
    yield from np.random.default_rng(0).random((3, size)) < 0.5


@torch.inference_mode()
@pytest.mark.parametrize("name", TINY)
def test_each_model_is_the_switched_one_bit_for_bit(name):
    model = make_model(name)
    board, inputs = Switchboard(model), make_inputs(name)
    masks = list(masks_of(board))
    for mask, plain in zip(masks, sd_gym.bank(model, masks), strict=True):
        with board.decide(mask[None]):
            wanted = model(**inputs).logits
        assert torch.equal(plain(**inputs).logits, wanted)


@torch.inference_mode()
@pytest.mark.parametrize("name", [*DECODER, *ENCODER_DECODER])
def test_it_generates_the_same_with_caches_and_beams(name):
    model = make_model(name)
    board, inputs = Switchboard(model), make_inputs(name, side="left" if name in DECODER else "right")
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    masks = list(masks_of(board))[::3]
    for number, (mask, plain) in enumerate(zip(masks, sd_gym.bank(model, masks), strict=True)):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1 + number % 2}
        with board.decide(mask[None]):
            wanted = model.generate(**prompts, **options)
        assert torch.equal(plain.generate(**prompts, **options), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("name", DECODER)
def test_prompt_lookup_gives_the_same_though_it_crops_the_cache(name):
    model, inputs = make_model(name), make_inputs(name, batch=1, side="left")
    prompt, masks = {key: inputs[key] for key in ("input_ids", "attention_mask")}, list(masks_of(Switchboard(model)))
    for plain in sd_gym.bank(model, masks):
        greedy = plain.generate(**prompt, max_new_tokens=6, do_sample=False)
        looked_up = plain.generate(**prompt, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
        assert torch.equal(looked_up, greedy)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "t5", "bart"])
def test_static_caches_work(name):
    model = make_model(name)
    board, inputs = Switchboard(model), make_inputs(name, side="left" if name in DECODER else "right")
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    mask = np.array([switch.index == 0 for switch in board.switches])  # what usually counts the positions
    with board.decide(mask[None]):
        wanted = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    (plain,) = sd_gym.bank(model, [mask])
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(plain.generate(**prompts, max_new_tokens=4, do_sample=False, **options), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_those_of_the_switched_model_and_its_own_stay(name):
    model, untouched = (make_model(name, "eager") for _ in range(2))
    inputs, asked = make_inputs(name), {"output_hidden_states": True, "output_attentions": True}

    def states(model):
        output = model(**inputs, output_hidden_states=True)
        return [state for key in sorted(output) if "hidden_states" in key for state in output[key]]

    if name in ASKED_BEFORE:
        states(model)  # its hooks are installed
    board = Switchboard(model)
    skip = np.array([switch.index == 1 for switch in board.switches])
    calls, (layer,) = [], [stack.layers_in(model)[1] for stack in board.architecture.stacks[:1]]
    layer.register_forward_hook(lambda *args, **kwargs: calls.append(len(args)), with_kwargs=True)
    dense, skipping = sd_gym.bank(model, [~skip & False, skip])
    with board.decide(skip[None]):
        wanted = states(model)
    assert all(map(torch.equal, states(skipping), wanted))
    assert len(states(skipping)) == len(wanted)
    assert set(calls) == {4}
    board.remove()
    for same in (dense, model):
        ours, theirs = same(**inputs, **asked), untouched(**inputs, **asked)
        assert list(ours) == list(theirs)
        assert all(len(ours[key]) == len(theirs[key]) for key in ours)
    with pytest.raises(NotImplementedError, match="leave output_attentions out"):
        skipping(**inputs, output_attentions=True)


def test_all_share_the_weights_of_the_model_which_stays_as_it_was():
    model = make_model("llama")
    model(**make_inputs("llama"))  # its hooks are installed
    before = dict(model.named_modules())
    weights = {id(weight) for weight in model.parameters()}
    half, none, same = sd_gym.bank(model, [[1, 0, 0, 1, 1, 1], [1] * 6, torch.zeros(7, dtype=torch.long)])
    assert all(id(weight) in weights for plain in (half, none, same) for weight in plain.parameters())
    assert [sum(1 for _ in plain.parameters()) for plain in (half, none)] == [12, 3]
    assert dict(model.named_modules()) == before
    assert "_switchboard" not in vars(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not half(**make_inputs("llama")).logits.any()


def test_of_an_attached_model_it_follows_its_own_mask():
    model = make_model("bert")
    inputs, mask = make_inputs("bert"), np.array([0, 1, 1, 0, 0, 0], dtype=bool)
    sd_gym.attach(model, make_policy(model))
    (plain,) = sd_gym.bank(model, [mask])
    with torch.inference_mode(), model._switchboard.decide(mask[None]):
        wanted = model(**inputs).logits
    with torch.inference_mode():
        assert torch.equal(plain(**inputs).logits, wanted)
    assert not hasattr(plain, "decisions")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0] * 5, r"expected a mask of 6 switches.*got \[5\]"),
        ([0, 0, 2, 2, 0, 0], "each 0 or 1"),
        ([0, 0, 1, 1, 0, 0, 1], "drops tokens"),
    ],
)
def test_a_mask_that_is_no_model_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        sd_gym.bank(make_model("bert"), [mask])


def test_only_the_dense_model_of_a_bank_is_saved(tmp_path):
    model = make_model("bert")
    dense, half = sd_gym.bank(model, [[0] * 6, [0, 1, 0, 0, 0, 0]])
    dense.save_pretrained(tmp_path / "dense")
    for other in (half, copy.deepcopy(half)):
        with pytest.raises(NotImplementedError, match=r"lacks the weights of what it skips; sd_gym\.bake\(model"):
            other.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    model.save_pretrained(tmp_path / "half")


def test_what_another_tool_has_wrapped_is_refused():
    model = make_model("bert")
    inner = model.bert.encoder.layer[0].forward
    model.bert.encoder.layer[0].forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(NotImplementedError, match="another tool has replaced forward"):
        sd_gym.bank(model, [[1, 0, 0, 0, 0, 0]])
