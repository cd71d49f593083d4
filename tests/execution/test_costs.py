"""FLOPs that a split says are executed are those that a counter counts."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.execution.conftest import SMALL, Drawn


@pytest.mark.parametrize("width", [1, 10**9])  # calls are dear: one pass; they are free: many
@pytest.mark.parametrize("task", ["Classification", "Summarization"])
def test_executed_flops_are_counted_flops_padding_included(task, width, monkeypatch):
    core = gym.make(f"SD/{task}-Mini-v0", **SMALL).unwrapped.core
    split, rows = core.split("test"), np.arange(12)
    split.tokens.scores  # noqa: B018  (ranking by idf multiplies nothing)
    decisions = Drawn(core).decide(rows)
    monkeypatch.setattr(core.backbone.model.config, "d_model", width)
    core.backbone.model.set_attn_implementation("eager")  # the only one whose products the counter sees on a CPU
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            parts = [picked for picked, _, _ in split.passes.logits(rows, decisions)]
    finally:
        core.backbone.model.set_attn_implementation("sdpa")
    assert (len(parts) == 1) == (width == 1)
    assert counter.get_total_flops() == split.costs.executed_flops(rows, decisions, parts)
    alone = split.costs.executed_flops(rows, decisions, [np.array([row]) for row in range(12)])
    assert alone == split.costs.flops(rows, decisions).sum()
    assert split.costs.executed_flops(rows, decisions, parts) >= alone


def test_ranking_by_attention_is_executed_on_the_whole_batch():
    core = gym.make("SD/Summarization-Mini-v0", **SMALL, token_ranking="attention").unwrapped.core
    split, rows = core.split("test"), np.arange(12)
    decisions = Drawn(core).decide(rows)
    parts = [np.array([row]) for row in range(12)]
    idf = gym.make("SD/Summarization-Mini-v0", **SMALL).unwrapped.core.split("test")
    more = split.costs.executed_flops(rows, decisions, parts) - idf.costs.executed_flops(rows, decisions, parts)
    longest = np.array([split.encoded.source_length[rows].max()])
    assert more == 12 * core.backbone.flops.costs(longest, longest)[1][0, 0]


def test_texts_that_are_generated_with_beams_cost_more_in_the_decoder():
    one, four = (
        gym.make("SD/Summarization-Mini-v0", **SMALL, num_beams=beams).unwrapped.core.split("test").costs
        for beams in (1, 4)
    )
    rows, decoder = np.arange(12), one._backbone.flops._on_target
    decisions = np.tile([*decoder, 0], (12, 1)).astype(np.int64)
    for costs in (one, four):
        assert (costs.flops_ratio(rows, decisions) < 1).all()
    assert (four.flops_ratio(rows, decisions) < one.flops_ratio(rows, decisions)).all()
    assert (four.dense_flops(rows) < 4 * one.dense_flops(rows)).all()
    assert (four.head_flops(rows) == 4 * one.head_flops(rows)).all()
