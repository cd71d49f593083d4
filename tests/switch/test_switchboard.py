"""Exact invariants of switching, on every supported architecture."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import sd_gym.switch
from sd_gym.switch import StaleBoardError, Switchboard, UnsupportedArchitectureError, supported_architectures
from tests.conftest import DECODER, ENCODER, ENCODER_DECODER, TINY, make_inputs, make_model, row_of
from tests.switch.conftest import GENERATING, Synchronisations, logits, mixed, random_decisions


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
    assert len(board) == (2 * 2 + 2 * 3 if name in ENCODER_DECODER else 3 * 2)
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
def test_everything_skipped_still_gives_an_output(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    with board.decide(torch.ones(5, len(board), dtype=torch.long)):
        assert torch.isfinite(model(**inputs).logits).all()


def test_gradients_reach_only_what_ran(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = torch.zeros(5, len(board), dtype=torch.long)
    skip[:, 0] = 1
    skip[:3, 1] = 1
    with board.decide(skip):
        model(**inputs).logits.sum().backward()
    shared = {id(p) for p in model.get_input_embeddings().parameters()}
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


@pytest.mark.parametrize("first", ["with tokens dropped", "without"])
def test_the_same_switches_with_and_without_tokens_dropped_are_two_decisions(first, kind):
    """Whichever a board has seen first, as boards remember decisions."""
    inputs, board = make_inputs(kind), Switchboard(make_model(kind))
    skip, keep = random_decisions(board, 5, 7, 0)
    pair = [keep, None] if first == "with tokens dropped" else [None, keep]
    one_board = [logits(board, skip, inputs, tokens) for tokens in pair]
    each_its_own = [logits(Switchboard(make_model(kind)), skip, inputs, tokens) for tokens in pair]
    assert all(map(torch.equal, one_board, each_its_own))
    assert not torch.equal(*one_board)


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


def test_bad_decisions_are_refused(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    n = len(board)
    zeros = np.zeros((5, n), int)
    with pytest.raises(ValueError, match=rf"\[batch, {n}\].*got \[5, {n + 1}\]"), board.decide(torch.zeros(5, n + 1)):
        pass
    with pytest.raises(ValueError, match="skip must hold only 0"), board.decide(np.full((5, n), 2)):
        pass
    with pytest.raises(ValueError, match="keep is for 4 rows and skip for 5"), board.decide(zeros, np.ones((4, 7))):
        pass
    with pytest.raises(ValueError, match="without any token"), board.decide(zeros, np.zeros((5, 7))):
        pass
    with board.decide(torch.ones(4, n, dtype=torch.long)), pytest.raises(ValueError, match=r"4 rows.*got 5"):
        model(**inputs)


def test_a_removed_board_decides_no_more():
    board = Switchboard(make_model("bert"))
    board.remove()
    with pytest.raises(StaleBoardError, match=r"removed.*new Switchboard"):
        board.decide(np.ones((1, len(board))))


def test_boards_are_copied_and_pickled_with_their_models(kind):
    board, inputs = Switchboard(make_model(kind)), make_inputs(kind)
    skip = mixed(board, 5)
    expected = logits(board, skip, inputs)
    for other in (copy.deepcopy(board), pickle.loads(pickle.dumps(board))):
        assert torch.equal(logits(other, skip, inputs), expected)
        other.remove()
        assert not any(
            {"forward", "generate", "_switchboard"} & vars(module).keys() for module in other.model.modules()
        )
    assert torch.equal(logits(board, skip, inputs), expected)
    loaded = pickle.loads(pickle.dumps(board.model))
    assert torch.equal(logits(Switchboard(loaded), skip, inputs), expected)


def test_sentence_transformers_are_refused_by_name():
    modules = pytest.importorskip("sentence_transformers")
    model = modules.SentenceTransformer(modules=[nn.Identity()])
    with pytest.raises(TypeError, match=r"SentenceTransformer sorts its texts.*model\[0\].auto_model.*single row"):
        Switchboard(model)


def test_a_wrapped_model_is_unwrapped_and_anything_else_refused():
    model, inputs = make_model("bert"), make_inputs("bert")
    wrapped = nn.ModuleDict({"module": model})
    board = Switchboard(wrapped)
    assert board.model is model
    assert torch.equal(logits(board, 0 * mixed(board, 5), inputs), model(**inputs).logits)
    for wrong in (nn.Linear(2, 2), "bert-base-uncased"):
        with pytest.raises(TypeError, match=rf"needs a Hugging Face model.*got a {type(wrong).__name__}"):
            Switchboard(wrong)


def test_a_second_switchboard_is_refused():
    model = make_model("bert")
    Switchboard(model)
    with pytest.raises(RuntimeError, match=r"already carries a Switchboard; call its remove\(\) first"):
        Switchboard(model)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_layer_that_stands_twice_is_refused(name):
    model = make_model(name)
    layers = model.get_submodule("bert.encoder.layer" if name == "bert" else "encoder.block")
    layers[1] = layers[0]
    with pytest.raises(UnsupportedArchitectureError, match="a layer of the encoder stands twice in it"):
        Switchboard(model)


@torch.inference_mode()
def test_an_encoder_output_that_is_filled_again_is_read_again():
    model, inputs = make_model("bart"), make_inputs("bart")
    board = Switchboard(model)
    skip = np.zeros((5, len(board)))
    skip[0, board.names.index("decoder.0.cross_attention")] = 1
    encoded = [model.get_encoder()(ids).last_hidden_state for ids in (inputs["input_ids"], inputs["input_ids"].flip(1))]

    def decoded(states):
        return model(encoder_outputs=(states,), decoder_input_ids=inputs["decoder_input_ids"], use_cache=False).logits

    with board.decide(skip):
        wanted, buffer = decoded(encoded[1]), encoded[0].clone()
        decoded(buffer)
        assert torch.equal(decoded(buffer.copy_(encoded[1])), wanted)
