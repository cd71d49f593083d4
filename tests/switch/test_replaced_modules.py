"""A module that was replaced after the switchboard was made is noticed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sd_gym.switch import StaleBoardError, Switchboard
from tests.conftest import make_inputs, make_model
from tests.switch.conftest import KINDS, each_row_is_as_alone, logits, mixed, quantised


def test_a_replaced_module_is_noticed_and_a_new_board_is_exact(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    switch = board.switches[1]
    path, old = switch.sublayer.modules[0], switch.modules[0]
    parent, _, child = path.rpartition(".")
    setattr(switch.layer.get_submodule(parent), child, copy.deepcopy(old))
    with pytest.raises(StaleBoardError, match=rf"{path} was replaced.*make a new Switchboard"):
        board.decide(mixed(board, 5))
    board.remove()
    board = Switchboard(model)
    each_row_is_as_alone(board, mixed(board, 5), inputs)
    layers = model.base_model.get_submodule(board.architecture.stacks[0].layers)
    layers[1] = copy.deepcopy(layers[0])
    with pytest.raises(StaleBoardError, match="1 was replaced"):
        board.decide(mixed(board, 5))


def test_quantising_in_place_is_noticed_where_it_replaces_what_is_switched():
    model, inputs = make_model("mbart"), make_inputs("mbart")
    board = Switchboard(model)
    quantised(model, inplace=True)
    with pytest.raises(StaleBoardError, match=r"fc1 was replaced.*make a new Switchboard"):
        board.decide(mixed(board, 5))
    board.remove()
    board = Switchboard(model)
    skip = np.ones((5, len(board)))
    assert not torch.equal(logits(board, skip, inputs), model(**inputs).logits)


@pytest.mark.parametrize("targets", [["query", "dense"], ["q_proj", "fc1", "fc2"], ["v_proj", "down_proj"]])
def test_adapters_are_switched_exactly_or_refused(targets):
    peft = pytest.importorskip("peft")
    name = KINDS[[["query", "dense"], ["q_proj", "fc1", "fc2"], ["v_proj", "down_proj"]].index(targets)]
    inputs = make_inputs(name)

    def adapted(model):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
        for path, weight in model.named_parameters():
            if "lora_B" in path:
                nn.init.normal_(weight, std=0.3)
        return model.eval()

    model = adapted(make_model(name))
    board = Switchboard(model)  # of the model inside
    each_row_is_as_alone(board, mixed(board, 5), inputs, model)
    model = make_model(name)
    board = Switchboard(model)
    model = adapted(model)
    if name == "mbart":  # its switched linears are replaced
        with pytest.raises(StaleBoardError, match="make a new Switchboard"):
            board.decide(mixed(board, 5))
        board.remove()
        board = Switchboard(model)
    each_row_is_as_alone(board, mixed(board, 5), inputs, model)
