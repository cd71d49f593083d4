"""Ranking tokens, and what dropping them does."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_gym.switch import (
    Switchboard,
    inverse_document_frequency,
    keep_tokens,
    position_scores,
    rarity_scores,
)
from tests.conftest import DECODER, ENCODER_DECODER, TINY, make_inputs, make_model, row_of
from tests.switch.conftest import fresh_cache, mixed


@given(length=st.integers(1, 12), share=st.floats(0, 0.99), seed=st.integers(0, 1000), droppable=st.floats(0, 1))
def test_the_lowest_droppable_scores_go(length, share, seed, droppable):
    random = np.random.default_rng(seed)
    scores, may_go = random.integers(0, 5, (4, length)).astype(float), random.random((4, length)) < droppable
    keep = keep_tokens(scores, may_go, share)
    assert keep[~may_go].all()
    for row in range(4):
        dropped = np.nonzero(~keep[row])[0]
        assert len(dropped) == int(share * may_go[row].sum() + 1e-9)
        stay = np.nonzero(keep[row] & may_go[row])[0]
        if len(dropped) and len(stay):
            assert scores[row, dropped].max() <= scores[row, stay].min()


def test_rows_may_drop_different_shares_and_ties_go_to_the_earlier_token():
    keep = keep_tokens(np.zeros((3, 4)), np.ones((3, 4), bool), np.array([0.0, 0.5, 0.75]))
    assert keep.tolist() == [[True] * 4, [True, True, False, False], [True, False, False, False]]


def test_a_wrong_share_or_shape_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1.0"):
        keep_tokens(np.zeros((1, 2)), np.ones((1, 2), bool), 1.0)
    with pytest.raises(ValueError, match="same shape"):
        keep_tokens(np.zeros((1, 2)), np.ones((1, 3), bool), 0.5)


def test_rankings():
    ids = np.array([[4, 5, 1]])
    corpus = [np.array([4, 4]), np.array([4, 9]), np.array([5])]
    scores = rarity_scores(ids, ids != 1, inverse_document_frequency(corpus))
    # Three documents; token 4 stands in two of them, token 5 in one.
    assert scores[0, :2] == pytest.approx([np.log(4 / 3), np.log(4 / 2)])
    assert scores[0, 2] == -np.inf
    # Nobody has seen token 77.
    assert rarity_scores(ids + 70, ids > 0, inverse_document_frequency(corpus)) == pytest.approx(np.log(4))
    assert (np.diff(position_scores((2, 5))) < 0).all()


@pytest.mark.parametrize("name", list(TINY))
@torch.inference_mode()
def test_dropping_is_the_model_without_these_tokens_at_their_positions(name):
    """What is dropped has no influence: any other token in its place gives the same output."""
    model, inputs = make_model(name), make_inputs(name, batch=2)
    board = Switchboard(model)
    keep = np.ones((2, 7), int)
    keep[0, [2, 4]] = 0
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, [2, 4]] = torch.tensor([11, 12])
    with board.decide(np.zeros((2, len(board)), int), keep):
        logits, changed = model(**inputs).logits, model(**other).logits
    assert torch.equal(logits, changed)
    assert not torch.equal(logits, model(**inputs).logits)
    if name in DECODER:
        # A causal model's earlier positions do not know what is dropped after them.
        torch.testing.assert_close(logits[0, :2], model(**inputs).logits[0, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODER_DECODER)
@torch.inference_mode()
def test_without_a_mask_rows_that_keep_different_numbers_of_tokens_are_as_alone(name):
    """The decoder reads no state of a token that a row has dropped and another one has kept."""
    model, inputs = make_model(name), make_inputs(name, batch=3)
    del inputs["attention_mask"]
    board = Switchboard(model)
    skip, keep = np.zeros((3, len(board)), int), np.ones((3, 7), int)
    keep[0, [2, 4, 5]] = 0
    keep[1, 3] = 0
    with board.decide(skip, keep):
        together = model(**inputs).logits
    for row in range(3):
        with board.decide(skip[row : row + 1], keep[row : row + 1]):
            alone = model(**row_of(inputs, row)).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("configured", [True, False])
@torch.inference_mode()
def test_a_decoder_that_attends_in_both_directions_does_so_when_tokens_are_dropped(attention, configured):
    """As its configuration says, or an argument of the call."""
    model, ids = make_model("llama", attention), make_inputs("llama", batch=3)["input_ids"]
    settings = {} if configured else {"is_causal": False}
    if configured:
        model.config.is_causal = False
    board, keep = Switchboard(model), np.ones((3, 7), int)
    keep[0, [2, 4, 5]] = keep[1, 3] = 0
    with board.decide(np.zeros((3, len(board)), int), keep):
        together = model(ids, **settings).logits
    for row, kept in enumerate(torch.from_numpy(keep).bool()):
        positions = torch.nonzero(kept).T
        alone = model(ids[[row]][:, kept], position_ids=positions, **settings).logits[0]
        torch.testing.assert_close(together[row, kept], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "mbart", "llama"])
@torch.inference_mode()
def test_layers_see_fewer_tokens(name):
    model, inputs = make_model(name), make_inputs(name, batch=2)
    board = Switchboard(model)
    seen = []
    keep = np.ones((2, 7), int)
    keep[:, [2, 3, 4]] = 0
    for switch in board.switches:
        if switch.reads_input:
            switch.modules[-1].register_forward_hook(lambda module, args, output: seen.append(_length(output)))
    with board.decide(np.zeros((2, len(board)), int), keep):
        model(**inputs)
    assert set(seen) == {4}


def test_layers_show_no_states_of_tokens_that_are_dropped():
    model, inputs = make_model("bert"), make_inputs("bert", batch=2)
    keep = np.ones((2, 7), int)
    keep[1, [2, 3]] = 0  # row 0 keeps all, so the states have room for all
    board = Switchboard(model)
    with board.decide(np.zeros((2, len(board)), int), keep):
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(NotImplementedError, match="leave output_hidden_states and output_attentions out"):
                model(**inputs, **{name: True})


def _length(output):
    return (output[0] if isinstance(output, tuple) else output).shape[1]


@torch.inference_mode()
def test_tokens_of_an_input_of_another_length_are_refused(name):
    model, inputs = make_model(name), make_inputs(name, source=16)
    board = Switchboard(model)
    for length in (9, 17):
        keep = np.ones((5, length), int)
        keep[:, 3] = 0
        with (
            board.decide(np.zeros((5, len(board)), int), keep),
            pytest.raises(ValueError, match=rf"inputs of {length} tokens.*got 16; keep needs one column per token"),
        ):
            model(**inputs)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ENCODER_DECODER)
@torch.inference_mode()
def test_tokens_to_keep_stay_the_same_in_a_loop_of_decoding(name, cached):
    """Equally many are kept, or fewer; the encoder has run once, and the decoder reads what it gave."""
    model, inputs = make_model(name), make_inputs(name, batch=4)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    board = Switchboard(model)
    skip = np.zeros((4, len(board)), int)
    keep = np.ones((4, 7), int)
    keep[:, 2] = 0
    others = [keep[:, [0, 2, 1, *range(3, 7)]], keep.copy()]
    others[1][:, 4] = 0
    decoder = inputs["decoder_input_ids"]
    step = {"attention_mask": inputs["attention_mask"], "use_cache": cached}
    cache = fresh_cache(name) if cached else None
    with board.decide(skip, keep):
        encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        whole = model(decoder_input_ids=decoder, encoder_outputs=encoded, **{**step, "use_cache": False}).logits
        model(decoder_input_ids=decoder[:, :2], encoder_outputs=encoded, cache=cache, **step)
    begin = 2 if cached else 0
    step |= {"decoder_input_ids": decoder[:, begin:3], "encoder_outputs": encoded}
    for other in others:
        with board.decide(skip, other), pytest.raises(ValueError, match=r"under (a decision|another decision)"):
            model(**step, cache=copy.deepcopy(cache))
    with board.decide(skip, keep):
        logits = model(**step, cache=copy.deepcopy(cache)).logits
    torch.testing.assert_close(logits[:, -1], whole[:, 2], rtol=1e-4, atol=1e-4)
    dense = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with board.decide(skip, keep), pytest.raises(ValueError, match="run the encoder under the same keep"):
        model(**{**step, "encoder_outputs": dense, "cache": None})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODER)
@torch.inference_mode()
def test_a_later_turn_may_be_longer_than_the_input_whose_tokens_were_dropped(name, attention):
    model = make_model(name, attention)
    ids = make_inputs(name, batch=2, source=12)["input_ids"]
    board = Switchboard(model)
    skip, keep = mixed(board, 2), np.ones((2, 5), int)
    keep[0, 1:3] = keep[1, 2] = 0
    logits = []
    with board.decide(skip, keep):
        for parts in ([7], [1] * 7):
            cache = fresh_cache(name)
            turns = [model(part, cache=cache, use_cache=True).logits for part in ids.split([5, *parts], dim=1)]
            logits.append(torch.cat(turns[1:], dim=1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_keep_that_is_narrower_than_the_prompt_is_refused(use_cache):
    model, keep = make_model("llama"), np.array([[1, 0, 1, 1, 1]])
    board = Switchboard(model)
    with board.decide(np.zeros((1, len(board))), keep), pytest.raises(ValueError, match=r"of 5 tokens.*got 7; keep"):
        model.generate(torch.full((1, 7), 5), max_new_tokens=2, use_cache=use_cache)


@pytest.mark.parametrize("name", ENCODER_DECODER)
@torch.inference_mode()
def test_an_encoder_that_dropped_no_tokens_is_refused_where_one_row_keeps_all(name):
    """Its output has the expected length, but other positions."""
    model, inputs = make_model(name), make_inputs(name, batch=2)
    board = Switchboard(model)
    skip, keep = np.zeros((2, len(board)), int), np.ones((2, 7), int)
    keep[1, 1:4] = 0
    decoder = {"attention_mask": inputs["attention_mask"]}
    dense = model.get_encoder()(inputs["input_ids"], **decoder)
    write = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with board.decide(skip, keep):
        own = model.get_encoder()(inputs["input_ids"], **decoder)
        expected = model.generate(inputs["input_ids"], **decoder, **write)
        assert torch.equal(model.generate(encoder_outputs=own, **decoder, **write), expected)
        with pytest.raises(ValueError, match="run the encoder under the same keep"):
            model.generate(encoder_outputs=dense, **decoder, **write)
        with pytest.raises(ValueError, match="run the encoder under the same keep"):
            model(encoder_outputs=dense, decoder_input_ids=inputs["decoder_input_ids"], **decoder)
