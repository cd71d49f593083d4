"""FLOPs that a split says are executed are those that a counter counts."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.envs.conftest import trained
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


def test_a_text_after_a_prompt_is_written_again_at_the_cost_of_what_runs_again(tmp_path, tiny_tokenizer):
    """Dense, less what earlier switches have run on the prompt; in one pass, as all FLOPs of texts are counted."""
    core, *_ = trained("prompted", "position", tmp_path, tiny_tokenizer, stages=("first", "answer"))
    split, board = core.split("test"), core.backbone.board
    board.model.set_attn_implementation("eager")

    def counted(run, skip):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter, board.decide(skip):
            run()
        return counter.get_total_flops()

    for row, first in enumerate(range(len(board))):
        rows, mask = np.array([row]), np.zeros((1, len(board) + 1), dtype=np.int64)
        mask[:, first] = 1
        inputs, start = split.passes.inputs(rows), first - first % 2
        ran = np.arange(len(board))[None] < start

        def read(ids=inputs["input_ids"]):
            board.model(input_ids=ids, use_cache=False)

        whole = counted(lambda inputs=inputs: core.backbone.logits(inputs), 0 * ran)
        rest = whole - counted(read, 0 * ran) + counted(read, ran)
        assert split.costs.going_on(rows, mask) == [rest]
        accepted = split.costs.flops(rows, np.append(mask, [[0]], axis=1))
        goes_on = np.append(mask, [[1]], axis=1)
        assert split.costs.flops(rows, goes_on) == accepted + rest
        assert split.costs.executed_flops(rows, goes_on, [np.array([0])]) == accepted + rest
    mask[:, -1] = 1
    assert split.costs.going_on(rows, mask) == split.costs.dense_flops(rows)  # dropped tokens come back


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
