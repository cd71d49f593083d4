"""A decision is for the rows and the pass that it was made for, whatever runs the model."""

import accelerate
import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sd_gym.policy.features import pooled_features
from sd_gym.switch import Switchboard
from tests.conftest import make_inputs, make_model
from tests.devices import Devices, spread
from tests.switch.conftest import logits, mixed, random_decisions


@torch.inference_mode()
def test_other_rows_than_those_decided_on_are_refused(name):
    """Also as many as a multiple of them: they are other rows all the same."""
    model, inputs = make_model(name), make_inputs(name, batch=8)
    board = Switchboard(model)
    for column in range(len(board)):
        skip = np.zeros((4, len(board)), int)
        skip[1:, column] = 1
        with board.decide(skip), pytest.raises(ValueError, match=r"for 4 rows, but the model got 8; give one row of"):
            model(**inputs)


@torch.inference_mode()
def test_a_single_row_of_decisions_stands_for_all(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = mixed(board, 1, seed=3)
    keep = np.array([[1, 1, 0, 1, 0, 1, 1]])
    for kept in (None, keep):
        every = None if kept is None else np.repeat(kept, 5, axis=0)
        assert torch.equal(logits(board, skip, inputs, kept), logits(board, np.repeat(skip, 5, axis=0), inputs, every))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_compiled_models_follow_decisions(kind, attention):
    model, inputs = make_model(kind, attention), make_inputs(kind)
    board = Switchboard(model)
    keep = np.random.default_rng(0).random((5, 7)) < 0.7
    keep[:, 0] = True
    decisions = [(mixed(board, 5, seed), kept) for seed, kept in enumerate((None, keep))]
    with torch.inference_mode():
        dense = model(**inputs).logits
        expected = [logits(board, skip, inputs, kept) for skip, kept in decisions]
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(compiled(**inputs).logits, dense)
            for (skip, kept), right in zip(decisions, expected, strict=True):
                with board.decide(skip, kept):
                    assert torch.equal(compiled(**inputs).logits, right)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_decision_is_one_for_all_rows_or_refused(strict):
    model, inputs = make_model("bert"), make_inputs("bert")
    board = Switchboard(model)
    other = make_inputs("bert", batch=3, seed=1)
    batch = {key: {0: torch.export.Dim.DYNAMIC} for key in inputs}

    def export(*decision):
        with torch.no_grad(), board.decide(*decision):
            return torch.export.export(model, (), inputs, dynamic_shapes=batch, strict=strict).module()

    single = mixed(board, 1)
    torch.testing.assert_close(export(single)(**other).logits, logits(board, single, other))
    for decision in ((mixed(board, 5),), (0 * single, np.array([[1, 1, 0, 1, 1, 1, 1]]))):
        with pytest.raises(Exception, match="traced or exported model would keep the decisions"):
            export(*decision)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_decision_is_one_for_all_rows_or_refused():
    model, inputs = make_model("bert"), make_inputs("bert")
    model.config.return_dict = False
    board = Switchboard(model)
    other = make_inputs("bert", batch=3, seed=1)

    def trace(skip):
        with torch.no_grad(), board.decide(skip):
            return torch.jit.trace(model, tuple(inputs.values()), check_trace=False)

    single = mixed(board, 1)
    with torch.no_grad(), board.decide(single):
        expected = model(*other.values())[0]
    torch.testing.assert_close(trace(single)(*other.values())[0], expected)
    with pytest.raises(NotImplementedError, match="traced or exported model would keep the decisions of these 5 rows"):
        trace(mixed(board, 5))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_refused_while_it_is_on(name, reentrant):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    keep = np.ones((5, 7), int)
    keep[:, 2] = 0
    for skip, kept in ((mixed(board, 5), None), (0 * mixed(board, 5), keep)):
        with (
            board.decide(skip, kept),
            pytest.raises(NotImplementedError, match=r"gradient_checkpointing_disable\(\)"),
        ):
            model(**inputs)
    model.gradient_checkpointing_disable()
    with board.decide(mixed(board, 5)):
        model(**inputs).logits.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("drop", [True, False])
def test_checkpointing_by_hand_around_a_model_under_a_decision_is_refused(kind, reentrant, drop):
    """In the backward pass it would run densely, or under what is decided there."""
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    skip, keep = mixed(board, 5), np.ones((5, 7), int)
    keep[:, 2] = 0
    decision = (0 * skip, keep) if drop else (skip,)

    def run(embedded):
        return model(inputs_embeds=embedded, **inputs).logits

    def gradient(output):
        return torch.autograd.grad(output.pow(2).sum(), embedded)[0]

    def replayed(function):
        return checkpoint(function, embedded, use_reentrant=reentrant)

    with board.decide(*decision):
        expected = gradient(run(embedded))
        with pytest.raises(NotImplementedError, match=r"runs layers again in the backward pass.*decide inside"):
            replayed(run)
    dense = replayed(run)
    with board.decide(*decision), pytest.raises(NotImplementedError, match="runs layers again"):
        dense.pow(2).sum().backward()

    def inside(embedded):
        with board.decide(*decision):
            return run(embedded)

    output = replayed(inside)
    output.pow(2).sum().backward()
    torch.testing.assert_close(embedded.grad, expected)


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_offloaded_weights_are_switched_as_others(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    skip, keep = random_decisions(board, 5, 7, 0)
    expected = [logits(board, skip, inputs, kept) for kept in (None, keep)]
    board.remove()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    board = Switchboard(model)
    assert model.device.type == "meta"
    for kept, logits_of_kept in zip((None, keep), expected, strict=True):
        assert torch.equal(logits(board, skip, inputs, kept), logits_of_kept)


@pytest.mark.parametrize("kind", ["bert", "bart", "llama"])
@torch.inference_mode()
def test_a_model_on_two_devices_is_switched_as_on_one(kind):
    """The inputs are on the CPU, from where the hooks move them; masks follow the hidden states."""
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    skip, keep = random_decisions(board, 5, 7, 0)
    stages = ["first", board.stages[1]]
    layers = board.path_of_layers(board.architecture.stacks[0])

    def passes():
        columns, seen = board.decided_at(stages), []

        def choose(state):
            seen.append(pooled_features(state.hidden, state.mask).cpu())
            return skip[:, columns[state.stage]], keep if state.stage == "first" else None

        with board.decide_in_pass(choose, stages, inputs["attention_mask"]):
            return [logits(board, skip, inputs, keep), model(**inputs).logits, *seen]

    expected = passes()
    board.remove()
    with Devices():
        spread(model, [f"{layers}.1"])
        board = Switchboard(model)
        found = passes()
        assert {value.device.type for value in found} == {"cpu"}
    assert all(map(torch.equal, found, expected))
