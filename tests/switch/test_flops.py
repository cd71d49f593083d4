"""Analytic FLOPs are those that a counter counts."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sd_gym.switch import FlopsModel, Switchboard
from tests.conftest import ENCODER_DECODER, TINY, make_inputs, make_model
from tests.switch.conftest import random_decisions


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
