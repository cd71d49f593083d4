"""A sublayer runs on the rows that do not skip it and on no others."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.pytorch_utils import Conv1D

from sd_gym.switch import FlopsModel, Switchboard
from tests.conftest import ENCODER, ENCODER_DECODER, make_inputs, make_model
from tests.switch.conftest import logits, mixed, random_decisions


def test_flex_attention_is_refused_before_it_runs(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    model.set_attn_implementation("flex_attention")
    keep = np.ones((5, 7), int)
    keep[:, 2] = 0
    for skip, kept in ((mixed(board, 5), None), (0 * mixed(board, 5), keep)):
        with pytest.raises(NotImplementedError, match=r"set_attn_implementation\('sdpa'\)"):
            logits(board, skip, inputs, kept)


def test_dropped_tokens_are_refused_where_masks_do_not_name_pairs_of_positions(kind):
    """As those of flash attention, which runs on no CPU; rows are skipped exactly."""
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    skip, keep = mixed(board, 5), np.ones((5, 7), int)
    wanted = logits(board, skip, inputs)
    AttentionInterface.register("lengths", _attend_to_lengths)
    AttentionMaskInterface.register("lengths", flash_attention_mask)
    model.set_attn_implementation("lengths")
    counted = inputs["attention_mask"].bool() if kind == "llama" else slice(None)
    torch.testing.assert_close(logits(board, skip, inputs)[counted], wanted[counted], rtol=1e-4, atol=1e-4)
    keep[:3, 2] = 0
    for kept in (keep, keep[:1].repeat(5, axis=0)):
        with pytest.raises(
            NotImplementedError, match=r"'lengths' cannot .*; call model\.set_attn_implementation\('sdpa"
        ):
            logits(board, 0 * skip, inputs, kept)


def _attend_to_lengths(module, query, keys, values, mask, is_causal=None, **settings):
    """Attention under a mask of keys, ``[batch, keys]``, as flash attention has it."""
    allowed = torch.ones(len(query), 1, query.shape[2], keys.shape[2], dtype=torch.bool)
    if mask is not None:
        allowed = allowed & mask[:, None, None].bool()
    if module.is_causal if is_causal is None else is_causal:
        allowed = allowed.tril() | torch.eye(*allowed.shape[2:], dtype=torch.bool)
    return sdpa_attention_forward(module, query, keys, values, allowed, is_causal=False, **settings)


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
                    if part not in _source(switch):
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


def _source(switch):
    return [switch.layer.get_submodule(path) for path in switch.sublayer.source]


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
