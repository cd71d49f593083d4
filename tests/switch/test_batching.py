"""Which rows run together never changes what a row gets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_gym.switch import Switchboard, batching, passes
from tests.conftest import DECODER, TINY, make_inputs, make_model


@st.composite
def batches(draw):
    """Decisions and lengths of a batch, some rows sharing a decision."""
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, switches, different = draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(st.integers(1, 40))
    patterns = random.random((different, switches)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    shape = draw(st.sampled_from([n, (n, switches)]))
    lengths = random.integers(1, draw(st.sampled_from([2, 50, 900])), size=shape)
    return patterns[random.integers(different, size=n)], lengths


@given(
    batch=batches(),
    width=st.sampled_from([1, 64, 1024, 10**6]),
    steps=st.sampled_from([0, 30]),
    most=st.sampled_from([None, 1, 3, 8, 40]),
)
def test_every_row_is_in_exactly_one_pass(batch, width, steps, most):
    parts = passes(*batch, width, steps, most)
    assert sorted(np.concatenate(parts)) == list(range(len(batch[1])))
    assert all(1 <= len(rows) <= (most or 40) for rows in parts)


@given(batch=batches(), width=st.sampled_from([64, 1024, 10**6]), steps=st.sampled_from([0, 30]))
def test_the_plan_is_never_dearer_than_one_pass_or_one_a_decision(batch, width, steps):
    skip, lengths = batch

    def cost(rows):
        """The model again, in plain words: calls, then tokens, then tokens that are moved."""
        runs = ~skip[rows]
        calls = 1 + sum(column.any() for column in runs.T)
        total = batching.CALL / width * calls * (1 + steps)
        for switch, column in enumerate(runs.T):
            longest = (lengths[rows] if lengths.ndim == 1 else lengths[rows, switch]).max() + steps
            moved = len(rows) if column.any() and not column.all() else 0
            total += longest * (column.sum() + batching.MIXING / width * moved)
        return total

    group = np.unique(skip, axis=0, return_inverse=True)[1].reshape(-1)
    by_decision = [np.nonzero(group == number)[0] for number in range(group.max() + 1)]
    chosen = sum(map(cost, passes(skip, lengths, width, steps)))
    assert chosen <= cost(np.arange(len(skip))) * (1 + 1e-9)
    assert chosen <= sum(map(cost, by_decision)) * (1 + 1e-9)


def test_short_rows_run_together_and_long_rows_with_their_like():
    skip = np.array([[0, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0, 0]])
    assert len(passes(skip, np.full(4, 8), 128)) == 1
    assert sorted(rows.tolist() for rows in passes(skip, np.full(4, 10**6), 128)) == [[0, 2], [1, 3]]
    by_length = passes(np.zeros((4, 3)), np.array([900, 5, 900, 5]), 512)
    assert [rows.tolist() for rows in by_length] == [[1, 3], [0, 2]]


def test_rows_are_cut_first_by_what_saves_most():
    """Of many lengths a pass for each, of both decisions; of one length, one for each decision."""
    lengths, skip = np.repeat([10, 20, 40, 80], 32), np.eye(2, 12, dtype=int)[np.arange(128) % 2]
    assert [sorted(set(lengths[rows])) for rows in passes(skip, lengths, 384)] == [[10], [20], [40], [80]]
    assert all(len(set(skip[rows, 0])) == 2 for rows in passes(skip, lengths, 384))
    long = passes(skip, np.full(128, 2000), 384)
    assert sorted(map(len, long)) == [64, 64]
    assert all(len(set(skip[rows, 0])) == 1 for rows in long)


def test_generating_is_cut_less_than_one_pass():
    patterns = np.random.default_rng(0).random((2, 30)) < 0.5
    skip, lengths = patterns[np.arange(8) % 2], np.full(8, 900)
    assert len(passes(skip, lengths, 512)) == 2
    assert len(passes(skip, lengths, 512, steps=100)) == 1


def test_where_passes_are_small_rows_that_agree_share_them():
    """Then each pass of a decision's rows calls what they run, and no more; of equal decisions the lengths are near."""
    random = np.random.default_rng(0)
    patterns = random.random((4, 12)) < 0.5
    group, lengths = random.permutation(np.arange(64) % 4), random.integers(5, 20, size=64)
    parts = passes(patterns[group], lengths, 512, steps=30, most=8)
    assert [len(rows) for rows in parts] == [8] * 8
    assert all(len(set(group[rows])) == 1 for rows in parts)
    for number in range(4):
        own = sorted(sorted(lengths[rows]) for rows in parts if group[rows[0]] == number)
        assert own[0][-1] <= own[1][0]


def test_a_pass_without_room_is_refused():
    with pytest.raises(ValueError, match="at least 1 row per pass, got 0"):
        passes(np.zeros((4, 3)), np.ones(4, dtype=int), 512, most=0)


def test_no_rows_need_no_pass():
    assert passes(np.zeros((0, 3)), np.zeros(0, dtype=int), 512) == []


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"skip must be \[n, switches\].*got \[4, 3\] and \[5\]"):
        passes(np.zeros((4, 3)), np.ones(5, dtype=int), 512)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(list(TINY)), width=st.sampled_from([1, 4096, 10**6]), seed=st.integers(0, 10_000))
def test_a_row_gets_the_same_in_any_plan(name, width, seed):
    """From one pass for all (width 1: calls are dear) to one a decision and length (they are free)."""
    model, inputs = make_model(name), make_inputs(name, batch=6, source=9, seed=seed)
    board = Switchboard(model)
    random = np.random.default_rng(seed)
    skip = (random.random((3, len(board))) < 0.5)[random.integers(3, size=6)]
    with torch.inference_mode():
        with board.decide(skip):
            together = model(**inputs).logits
        planned = torch.full_like(together, torch.nan)
        for rows in passes(skip, inputs["attention_mask"].sum(dim=1).numpy(), width):
            part = {
                key: value[torch.from_numpy(rows)] if isinstance(value, torch.Tensor) else value
                for key, value in inputs.items()
            }
            longest = int(part["attention_mask"].sum(dim=1).max())
            part |= {key: part[key][:, :longest] for key in ("input_ids", "attention_mask")}
            with board.decide(skip[rows]):
                logits = model(**part).logits
            planned[rows, : logits.shape[1]] = logits
    for row in range(6):
        places = inputs["attention_mask"][row].bool() if name in DECODER else slice(None)  # padding means nothing
        torch.testing.assert_close(planned[row][places], together[row][places], rtol=1e-4, atol=1e-5)
