"""Exact invariants of switching, on every supported architecture."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import sd_gym.switch
from sd_gym.switch import (
    FlopsModel,
    Switchboard,
    supported_architectures,
)
from tests.conftest import DECODER, ENCODER, ENCODER_DECODER, TINY, make_inputs, make_model, row_of

GENERATING = ENCODER_DECODER + DECODER


@pytest.fixture(params=list(TINY))
def name(request):
    return request.param


def random_decisions(board, batch, length, seed, rate=0.5):
    """A skip matrix, and a keep matrix that leaves the first and the last token in place."""
    random = np.random.default_rng(seed)
    keep = random.random((batch, length)) < 0.7
    keep[:, [0, -1]] = True
    return random.random((batch, len(board))) < rate, keep


def test_every_supported_architecture_is_tested_here():
    assert supported_architectures() == sorted(TINY)


def hooks_of(model):
    """Transformers leaves some of its own behind, which collect the hidden states."""
    return [(*module._forward_pre_hooks.values(), *module._forward_hooks.values()) for module in model.modules()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.inference_mode()
def test_nothing_skipped_is_the_untouched_model_bit_for_bit(name, attention):
    model, inputs = make_model(name, attention), make_inputs(name)
    untouched = model(**inputs, output_hidden_states=True)
    keys, modules = list(model.state_dict()), [vars(module).copy() for module in model.modules()]
    hooks = hooks_of(model)
    board = Switchboard(model)
    stacks = {"bart": 2 * 2 + 2 * 3, "bert": 3 * 2}
    assert len(board) == stacks["bart" if name in ENCODER_DECODER else "bert"]
    assert list(model.state_dict()) == keys
    with board.decide(torch.zeros(5, len(board), dtype=torch.long), keep=inputs["attention_mask"] * 0 + 1):
        decided = model(**inputs, output_hidden_states=True)
    board.remove()
    removed = model(**inputs, output_hidden_states=True)
    states = "encoder_hidden_states" if name in ENCODER_DECODER else "hidden_states"
    for outputs in (decided, removed):
        assert torch.equal(outputs.logits, untouched.logits)
        assert all(torch.equal(*pair) for pair in zip(outputs[states], untouched[states], strict=True))
    assert [vars(module).keys() for module in model.modules()] == [module.keys() for module in modules]
    assert hooks_of(model) == hooks


@settings(max_examples=60, deadline=None)
@example(name="bert", attention="eager", side="right", rate=0.1, drop=True, batch=2, length=3, seed=0)  # no padding
@given(
    name=st.sampled_from(list(TINY)),
    attention=st.sampled_from(["eager", "sdpa"]),
    side=st.sampled_from(["left", "right"]),
    rate=st.sampled_from([0.1, 0.5, 0.9]),
    drop=st.booleans(),
    batch=st.integers(1, 6),
    length=st.integers(2, 11),
    seed=st.integers(0, 10_000),
)
def test_a_batch_of_mixed_decisions_is_each_row_alone(name, attention, side, rate, drop, batch, length, seed):
    side = side if name in DECODER else "right"
    model, inputs = make_model(name, attention), make_inputs(name, batch=batch, source=length, seed=seed, side=side)
    board = Switchboard(model)
    skip, keep = random_decisions(board, batch, length, seed, rate)
    keep = keep if drop else np.ones_like(keep)
    with torch.inference_mode():
        with board.decide(skip, keep):
            together = model(**inputs).logits
        for row in range(batch):
            with board.decide(skip[row : row + 1], keep[row : row + 1]):
                alone = model(**row_of(inputs, row)).logits[0]
            counted = slice(None)
            if name in DECODER:  # what stands at padding and at dropped tokens means nothing
                counted = inputs["attention_mask"][row].bool() & torch.from_numpy(keep[row])
            torch.testing.assert_close(together[row][counted], alone[counted], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(GENERATING),
    attention=st.sampled_from(["eager", "sdpa"]),
    beams=st.sampled_from([1, 3]),
    drop=st.booleans(),
    rate=st.sampled_from([0.3, 0.7, 1.0]),
    batch=st.integers(1, 5),
    length=st.integers(2, 9),
    seed=st.integers(0, 10_000),
)
def test_generating_over_a_cache_is_generating_without_and_each_row_alone(
    name, attention, beams, drop, rate, batch, length, seed
):
    model = make_model(name, attention)
    side = "left" if name in DECODER else "right"
    inputs = make_inputs(name, batch=batch, source=length, seed=seed, side=side)
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    # Longer than the sliding windows of 4; some rows end early.
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "length_penalty": 0.7}
    board = Switchboard(model)
    skip, keep = random_decisions(board, batch, length, seed, rate)
    keep = keep if drop else None
    with board.decide(skip, keep):
        cached = model.generate(**prompt, **arguments)
        again = model.generate(**prompt, **arguments)
        uncached = model.generate(**prompt, **arguments, use_cache=False)
    assert torch.equal(cached, again)
    assert torch.equal(cached, uncached)
    for row in range(batch):
        with board.decide(skip[row : row + 1], None if keep is None else keep[row : row + 1]):
            alone = model.generate(**row_of(prompt, row), **arguments)[0]
        assert torch.equal(cached[row][: len(alone)], alone)
        assert (cached[row][len(alone) :] == 1).all()  # padding


@pytest.mark.parametrize("name", GENERATING)
def test_logits_over_a_cache_are_those_without_within_noise(name):
    model = make_model(name)
    inputs = make_inputs(name, side="left" if name in DECODER else "right")
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    board = Switchboard(model)
    skip, keep = random_decisions(board, 5, 7, 0)
    arguments = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with board.decide(skip, keep):
        cached = model.generate(**prompt, **arguments).logits
        uncached = model.generate(**prompt, **arguments, use_cache=False).logits
    torch.testing.assert_close(torch.stack(cached), torch.stack(uncached), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mbart", "llama"])
def test_sampling_with_a_seed_is_the_same_with_and_without_cache(name):
    model = make_model(name)
    inputs = make_inputs(name, side="left" if name in DECODER else "right")
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    board = Switchboard(model)
    arguments = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}
    samples = []
    with board.decide(random_decisions(board, 5, 7, 0)[0]):
        for use_cache in (True, True, False):
            torch.manual_seed(3)
            samples.append(model.generate(**prompt, **arguments, use_cache=use_cache))
    assert len(samples[0]) == 10
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


@torch.inference_mode()
def test_half_precision_switches_too(name):
    model, inputs = make_model(name).to(torch.bfloat16), make_inputs(name)
    board = Switchboard(model)
    dense = model(**inputs).logits
    skip, keep = random_decisions(board, 5, 7, 0)
    with board.decide(skip * 0):
        assert torch.equal(model(**inputs).logits, dense)
    with board.decide(skip, keep):
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    for row in range(5):
        with board.decide(skip[row : row + 1], keep[row : row + 1]):
            alone = model(**row_of(inputs, row)).logits[0]
        counted = inputs["attention_mask"][row].bool() & torch.from_numpy(keep[row]) if name in DECODER else slice(None)
        noise = 0.05 * float(alone.float().abs().max())  # eight bits of mantissa, through a few layers
        torch.testing.assert_close(logits[row][counted], alone[counted], rtol=0.05, atol=noise)


@torch.inference_mode()
def test_nothing_skipped_has_the_untouched_loss(name):
    model, inputs = make_model(name), make_inputs(name)
    labels = labels_of(name, inputs)
    board = Switchboard(model)
    untouched = model(**inputs, labels=labels)
    with board.decide(np.zeros((5, len(board)), int)):
        decided = model(**inputs, labels=labels)
    assert torch.equal(decided.loss, untouched.loss)
    assert decided.keys() == untouched.keys()


class Synchronisations(TorchDispatchMode):
    """Counts what waits for the device where it is not the host itself."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] in self.WAITING
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_inside_a_forward_pass(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    runs = [lambda: model(**inputs)]
    if name in GENERATING:
        prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        runs.append(lambda: model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=2))
    skip, keep = random_decisions(board, 5, 7, 0)
    for run in runs:
        with torch.no_grad(), Synchronisations() as untouched:
            run()
        with torch.no_grad(), board.decide(skip, keep), Synchronisations() as decided:
            run()
        assert decided.count <= untouched.count


@torch.inference_mode()
def test_a_skipped_sublayer_is_never_called_and_sees_only_the_rows_that_run_it(name):
    model, inputs = make_model(name, "eager"), make_inputs(name)
    seen = {}

    def record(switch_name):
        return lambda module, args: seen.setdefault(switch_name, set()).add(len(args[0]))

    board = Switchboard(model)
    hooked = set()
    for switch in board.switches:
        for module in switch.modules:
            for part in module.modules():
                # Not the module whose ``forward`` is patched: it is called, and calls nothing inside.
                if part is not module and isinstance(part, nn.Linear | Conv1D):
                    hooked.add(switch.name)
                    if module.get_submodule(_path(module, part)) not in _source(switch):
                        part.register_forward_pre_hook(record(switch.name))
    skip = torch.zeros(5, len(board), dtype=torch.long)
    skip[:, 0] = 1
    skip[[0, 3], 1] = 1
    skip[1:, 2] = 1
    skip[:, 3] = 1
    with board.decide(skip), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert not {board.names[0], board.names[3]} & seen.keys()
    for switch, column in zip(board.switches, skip.T, strict=True):
        if switch.name in hooked and 0 < int(column.sum()) < 5:
            assert seen[switch.name] == {5 - int(column.sum())}
    # Bare linears have nothing inside to hook on, but the counter sees every product that is computed. Padded rows run
    # at full length.
    target = np.full(5, 4) if name in ENCODER_DECODER else None
    always, switched = FlopsModel(board).costs(np.full(5, 7), target)
    assert counter.get_total_flops() == (always + (switched * (1 - skip.numpy())).sum(axis=1)).sum()


def _path(module, part):
    return next(path for path, candidate in module.named_modules() if candidate is part)


def _source(switch):
    return [switch.layer.get_submodule(path) for path in switch.sublayer.source]


@pytest.mark.parametrize("end", [0, -1])  # of an encoder-decoder, a layer of each
@torch.inference_mode()
def test_a_layer_that_no_row_runs_is_passed_by(name, end):
    """But for norms behind its residual sums; what it shows is what it showed when it was called."""
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = random_decisions(board, 5, 7, 0)[0]
    places = [(switch.stack, switch.index) for switch in board.switches]
    skip[:, [place == places[end] for place in places]] = 1
    layer, called = board.switches[end].layer, []
    for norm in (module for module in layer.modules() if isinstance(module, nn.LayerNorm)):
        norm.weight.uniform_(0.5, 2.0)  # untrained ones are all alike, in whatever order they run
    layer.forward = lambda *args, **kwargs: (called.append(1), type(layer).forward(layer, *args, **kwargs))[1]
    passed_by = name != "t5"

    def run():
        called.clear()
        with board.decide(skip):
            outputs = model(**inputs, output_hidden_states=True)
        assert len(called) == 1 - passed_by
        shown = ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")
        return outputs.logits, *(states for name in shown for states in outputs.get(name) or ())

    outputs = run()
    board._patches.idle, board._plans, passed_by = lambda skipped, resumes: frozenset(), {}, False
    assert all(torch.equal(one, other) for one, other in zip(outputs, run(), strict=True))


@torch.inference_mode()
def test_everything_skipped_still_gives_an_output(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    with board.decide(torch.ones(5, len(board), dtype=torch.long)):
        assert torch.isfinite(model(**inputs).logits).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(TINY)),
    seed=st.integers(0, 10_000),
    source=st.integers(2, 20),
    target=st.integers(1, 12),
    drop=st.booleans(),
)
def test_analytic_flops_are_counted_flops(name, seed, source, target, drop):
    model = make_model(name, "eager")
    inputs = make_inputs(name, batch=1, source=source, target=target, seed=seed)
    board = Switchboard(model)
    skip, keep = random_decisions(board, 1, source, seed)
    keep = keep if drop else np.ones_like(keep)
    with torch.inference_mode(), board.decide(skip, keep), FlopCounterMode(display=False) as counter:
        model(**inputs)
    target_length = np.array([target]) if name in ENCODER_DECODER else None
    always, switched = FlopsModel(board).costs(np.array([source]), target_length, keep.sum(axis=1))
    assert counter.get_total_flops() == always[0] + (switched[0] * ~skip[0]).sum()


def test_gradients_reach_only_what_ran(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = torch.zeros(5, len(board), dtype=torch.long)
    skip[:, 0] = 1
    skip[:3, 1] = 1
    with board.decide(skip):
        model(**inputs).logits.sum().backward()
    shared = {id(p) for part in (model.get_input_embeddings(),) for p in part.parameters()}
    bias = "relative_attention_bias"  # of T5: made for all layers, whether or not its own runs
    skipped = board.switches[0].modules[-1].named_parameters()
    assert all(p.grad is None for path, p in skipped if id(p) not in shared and bias not in path)
    assert all(p.grad is not None for p in board.switches[1].modules[-1].parameters())


def labels_of(name, inputs):
    if name in ENCODER:
        return torch.tensor([0, 1, 0, 1, 0])
    return inputs["decoder_input_ids"] if name in ENCODER_DECODER else inputs["input_ids"]


def test_a_prepared_model_can_be_trained_with_labels(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    with board.decide(random_decisions(board, 5, 7, 0)[0]):
        model(**inputs, labels=labels_of(name, inputs)).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


def test_gradients_of_a_mixed_batch_are_the_sum_of_each_row_alone(name):
    model, inputs = make_model(name).double(), make_inputs(name)
    board = Switchboard(model)
    skip = random_decisions(board, 5, 7, 0)[0]
    counted = inputs["attention_mask"].bool() if name in DECODER else None

    def loss(rows, part):
        with board.decide(skip[rows]):
            logits = model(**part).logits
        return (logits if counted is None else logits[counted[rows]]).square().sum()

    loss(slice(None), inputs).backward()
    together = {path: p.grad for path, p in model.named_parameters()}
    model.zero_grad()
    for row in range(5):
        loss(slice(row, row + 1), row_of(inputs, row)).backward()
    for path, p in model.named_parameters():
        assert (p.grad is None) == (together[path] is None), path
        if p.grad is not None:
            torch.testing.assert_close(together[path], p.grad, rtol=1e-4, atol=1e-5)  # Gemma norms in float32


@torch.inference_mode()
def test_attention_weights_of_skipped_rows_are_zero_and_no_layer_takes_the_place_of_another(name):
    model, inputs = make_model(name, "eager"), make_inputs(name)
    board = Switchboard(model)
    skip = random_decisions(board, 5, 7, 0)[0]
    skip[0], skip[2] = False, True  # the first row runs every sublayer, the third one none
    kinds = [(switch.stack, switch.sublayer.kind) for switch in board.switches]
    with board.decide(skip):
        outputs = model(**inputs, output_attentions=True)
    for key in (key for key in outputs if key.endswith("attentions") and outputs[key]):
        stack = "encoder" if key.startswith("encoder") or name in ENCODER else "decoder"
        kind = "cross_attention" if key.startswith("cross") else "attention"
        columns = [column for own, column in zip(kinds, skip.T, strict=True) if own == (stack, kind)]
        for weights, column in zip(outputs[key], columns, strict=True):
            assert torch.equal(weights.flatten(1).any(dim=1), torch.from_numpy(~column))
            torch.testing.assert_close(weights[0].sum(-1), torch.ones_like(weights[0, ..., 0]))
    first = np.zeros_like(skip)
    first[:, 0] = True
    with board.decide(first), pytest.raises(NotImplementedError, match=r"no row runs.*leave output_attentions out"):
        model(**inputs, output_attentions=True)


def test_decisions_nest_and_end_with_their_block(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    ones = torch.ones(5, len(board), dtype=torch.long)
    with torch.inference_mode():
        dense = model(**inputs).logits
        with board.decide(ones):
            skipped = model(**inputs).logits
            with board.decide(0 * ones):
                assert torch.equal(model(**inputs).logits, dense)
            assert torch.equal(model(**inputs).logits, skipped)
        assert torch.equal(model(**inputs).logits, dense)


def test_a_forward_that_another_tool_has_put_in_place_stays():
    model, inputs = make_model("bert"), make_inputs("bert")
    module = model.base_model.encoder.layer[0].attention
    original, calls = module.forward, []
    module.forward = lambda *args, **kwargs: (calls.append(len(args[0])), original(*args, **kwargs))[1]
    mine = module.forward
    board = Switchboard(model)
    skip = np.zeros((5, len(board)), int)
    skip[:2, 0] = 1
    with torch.inference_mode(), board.decide(skip):
        model(**inputs)
    board.remove()
    assert calls == [3]
    assert module.forward is mine


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_gradients_reach_the_encoder_after_a_pass_without_them(name):
    """The rows of the encoder's output are taken once without gradients, and never used with them."""
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = np.zeros((5, len(board)), int)
    skip[0] = [not switch.reads_input for switch in board.switches]  # mixed in every sublayer of the decoder
    gradients = []
    for warm_up in (False, True):
        with board.decide(skip):
            encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
            inner = {"encoder_outputs": encoded, **{key: inputs[key] for key in inputs if key != "input_ids"}}
            if warm_up:
                with torch.no_grad():
                    model(**inner)
            model.zero_grad()
            model(**inner).logits.sum().backward()
        gradients.append([p.grad for path, p in model.named_parameters() if "encoder." in path and p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_every_public_function_and_class_has_an_example():
    """What describes an architecture is shown by register_architecture, all others by the switchboard."""
    described = {
        "Architecture",
        "PassState",
        "StaleBoardError",
        "Stack",
        "Sublayer",
        "Switch",
        "UnsupportedArchitectureError",
    }
    missing = [name for name in sd_gym.switch.__all__ if ">>>" not in getattr(sd_gym.switch, name).__doc__]
    assert set(missing) == described
