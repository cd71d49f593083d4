"""Methods are patched where a decision needs it, as long as it does, and give their places back."""

import contextlib

import numpy as np
import pytest
import torch

from sd_gym.switch import StaleBoardError, Switchboard
from tests.conftest import make_inputs, make_model
from tests.switch.conftest import each_row_is_as_alone, mixed


def test_a_forward_that_another_tool_puts_in_place_is_called_or_noticed(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    module, calls = board.switches[0].modules[0], []

    def wrap():
        before = module.forward
        module.forward = lambda *args, **kwargs: (calls.append(1), before(*args, **kwargs))[1]
        return module.forward

    mine = wrap()
    each_row_is_as_alone(board, mixed(board, 5), inputs)
    assert calls
    assert module.forward is mine
    with board.decide(mixed(board, 5)):
        theirs = wrap()  # in front of the switchboard, which cannot give its place back
    with pytest.raises(StaleBoardError, match=r"forward\(\) of a"):
        board.decide(mixed(board, 5))
    board.remove()
    assert module.forward is theirs
    board = Switchboard(model)
    each_row_is_as_alone(board, mixed(board, 5), inputs)


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


@torch.inference_mode()
def test_only_what_some_row_skips_is_shadowed_and_only_while_it_does(kind):
    """So a model whose rows all run, or on which nothing is decided, has nothing of the switchboard to pay for."""
    model = make_model(kind)
    board = Switchboard(model)
    skip = np.zeros((5, len(board)), int)
    skip[2, 1] = 1

    def patched():
        return {id(module) for module in model.modules() if "forward" in vars(module)}

    # Where a decoder's cache begins, it is noted under which decision it is filled.
    signed = {
        id(switch.layer.get_submodule(switch.sublayer.attention)) for switch in board.switches if switch.tags_cache
    }
    assert len(signed) == (kind != "bert")
    first, both = (
        {id(module) for switch in switches for module in switch.modules} | signed
        for switches in (board.switches[1:2], board.switches[1:3])
    )
    assert not patched()
    with board.decide(0 * skip):
        assert not patched()
    outer, inner = board.decide(skip), board.decide(np.roll(skip, 1, axis=1) | skip)
    with contextlib.ExitStack() as stack:
        stack.enter_context(outer)
        assert patched() == first
        stack.enter_context(inner)
        assert patched() == both
        stack.enter_context(board.decide(0 * skip))
        assert patched() == both
    assert not patched()
    assert "generate" not in vars(model)
