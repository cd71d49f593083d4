"""Key-value caches: exact where they go on under the decision that filled them, refused elsewhere."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache

from sd_gym.switch import Switchboard
from tests.conftest import DECODER, ENCODER_DECODER, TINY, make_inputs, make_model, row_of
from tests.switch.conftest import GENERATING, fresh_cache, random_decisions


def test_a_cache_that_was_filled_otherwise_is_refused():
    model = make_model("llama")
    ids = torch.randint(4, 40, (3, 5))
    board = Switchboard(model)
    skip = np.zeros((3, len(board)), int)
    skip[0] = 1
    with torch.inference_mode():
        dense = model(input_ids=ids, use_cache=True).past_key_values
        with board.decide(skip):
            with pytest.raises(ValueError, match="outside the decision"):
                model(input_ids=ids[:, :1], cache=copy.deepcopy(dense))
            decided = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"for 3 rows.*go on under the decision"):
            model(input_ids=ids[:, :1], cache=decided)
        with board.decide(skip), pytest.raises(NotImplementedError, match=r"dynamic caches.*StaticLayer"):
            model.generate(ids, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "mbart", "t5"])
@torch.inference_mode()
def test_a_cache_of_other_rows_or_tokens_is_refused(name):
    """Equally many rows skip, and equally many tokens are dropped, but they are others."""
    model, inputs = make_model(name), make_inputs(name, batch=4)
    board = Switchboard(model)
    attention = next(n for n, s in enumerate(board.switches) if s.stack == "decoder" and s.sublayer.kind == "attention")
    skip = np.zeros((4, len(board)), int)
    skip[:2, attention] = 1
    keep = np.ones((4, 7), int)
    keep[:, 2] = 0
    decisions = [(skip, None), (skip[::-1], None)]
    if name in DECODER:
        decisions += [(skip, keep), (skip, keep[:, [0, 2, 1, *range(3, 7)]]), (0 * skip, keep)]
    first, ids = dict(inputs, use_cache=True), "input_ids"
    if name in ENCODER_DECODER:
        encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        first, ids = (
            {"encoder_outputs": encoded, **{key: first[key] for key in first if key != ids}},
            "decoder_input_ids",
        )
    for number, (rows, kept) in enumerate(decisions):
        cache = fresh_cache(name)
        with board.decide(rows, kept):
            model(**first, cache=cache)
        step = {**first, ids: first[ids][:, :1], "cache": cache}
        if name in DECODER:
            step["attention_mask"] = torch.ones(4, 8, dtype=torch.long)
        for other, (others, other_kept) in [*enumerate(decisions), (None, (0 * skip, None))]:
            with board.decide(others, other_kept):
                if other == number:
                    model(**{**step, "cache": copy.deepcopy(cache)})
                    continue
                with pytest.raises(ValueError, match=r"filled (under a decision|outside)"):
                    model(**{**step, "cache": copy.deepcopy(cache)})


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "mbart", "t5"])
@torch.inference_mode()
def test_a_cache_goes_on_under_the_very_decision_that_filled_it(name):
    """Also where another one differs in feed-forwards alone, which store nothing in a cache."""
    model, inputs = make_model(name), make_inputs(name, batch=4)
    board = Switchboard(model)
    kinds = [switch.sublayer.kind for switch in board.switches]
    feed_forwards = [number for number, kind in enumerate(kinds) if kind == "feed_forward"]
    decisions = [np.zeros((4, len(board)), int) for _ in range(4)]
    decisions[0][:2, feed_forwards[-1]] = 1
    decisions[1][2:, feed_forwards[-1]] = 1
    decisions[2][:, feed_forwards[0]] = 1
    first, ids = dict(inputs, use_cache=True), "input_ids"
    if name in ENCODER_DECODER:
        encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        first, ids = {"encoder_outputs": encoded, **first}, "decoder_input_ids"
        del first["input_ids"]
    for number, skip in enumerate(decisions):
        cache = fresh_cache(name)
        with board.decide(skip):
            model(**first, cache=cache)
        step = {**first, ids: first[ids][:, :1]}
        if name in DECODER:
            step["attention_mask"] = torch.ones(4, 8, dtype=torch.long)
        for other, others in enumerate(decisions):
            with board.decide(others):
                if other == number:
                    model(**step, cache=copy.deepcopy(cache))
                    continue
                with pytest.raises(ValueError, match=r"filled (under a decision|outside)"):
                    model(**step, cache=copy.deepcopy(cache))


@pytest.mark.parametrize("name", ["llama", "mistral", "bart", "t5"])
@torch.inference_mode()
def test_a_cache_that_was_emptied_is_as_a_new_one(name):
    """Under any decision, or none, whatever decision had filled it."""
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    (skip, keep), (other, other_keep) = (random_decisions(board, 5, 7, seed) for seed in (0, 1))
    other[0] = True
    nothing = np.zeros_like(skip)
    decisions = [(skip, None), (skip, keep), (other, other_keep), (nothing, None), (nothing, keep)]

    def new():
        layers = DynamicCache(config=model.config)  # has sliding windows, which a cache without config has not
        return layers if name in DECODER else EncoderDecoderCache(layers, DynamicCache())

    def own_layers(cache):
        return [type(layer) for layer in getattr(cache, "self_attention_cache", cache).layers]

    def run(decision, cache):
        first = {**inputs, "use_cache": True, "cache": cache}
        with board.decide(*decision):
            logits = model(**first).logits
            step = {**first, "decoder_input_ids" if name in ENCODER_DECODER else "input_ids": torch.full((5, 1), 5)}
            if name in DECODER:
                step["attention_mask"] = torch.cat(
                    [inputs["attention_mask"], torch.ones(5, 1, dtype=torch.long)], dim=1
                )
            return torch.cat([logits, model(**step).logits], dim=1)

    used = new()
    for decision in (*decisions, *reversed(decisions)):
        wanted = run(decision, new())
        assert torch.equal(run(decision, used), wanted)
        assert used.get_seq_length() == inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1] + 1
        used.reset()
        assert used.get_seq_length() == 0
        assert own_layers(used) == own_layers(new())


@torch.inference_mode()
def test_the_rows_and_positions_of_a_cache_stay_as_they_were_decided_on():
    model = make_model("llama")
    board = Switchboard(model)
    skip = np.zeros((3, len(board)), int)
    skip[0] = 1
    with board.decide(skip):
        cache = model(input_ids=torch.randint(4, 40, (3, 5)), use_cache=True).past_key_values
        for change in (lambda: cache.batch_select_indices(torch.tensor([0])), lambda: cache.batch_repeat_interleave(2)):
            with pytest.raises(NotImplementedError, match=r"rows of a cache .* cannot be selected or repeated; run"):
                change()
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.crop(-1)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
@torch.inference_mode()
def test_an_encoder_that_decodes_goes_on_under_the_decision_that_filled_its_cache(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, is_decoder=True, vocab_size=40, pad_token_id=1, **TINY[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    board = Switchboard(model)
    ids = torch.randint(4, 40, (3, 5))
    skip = np.zeros((3, len(board)), int)
    skip[0, board.names.index("encoder.1.feed_forward")] = 1
    with board.decide(skip):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], cache=copy.deepcopy(cache))
    for other in (0 * skip, skip[::-1]):
        with board.decide(other), pytest.raises(ValueError, match="filled under a decision"):
            model(input_ids=ids[:, :1], cache=cache)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(GENERATING),
    attention=st.sampled_from(["eager", "sdpa"]),
    beams=st.sampled_from([1, 3]),
    drop=st.booleans(),
    rate=st.sampled_from([0.3, 0.7, 1.0]),
    batch=st.integers(1, 5),
    length=st.integers(2, 9),
    seed=st.integers(0, 10_000),
)
def test_generating_over_a_cache_is_generating_without_and_each_row_alone(
    name, attention, beams, drop, rate, batch, length, seed
):
    model = make_model(name, attention)
    side = "left" if name in DECODER else "right"
    inputs = make_inputs(name, batch=batch, source=length, seed=seed, side=side)
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    # Longer than the sliding windows of 4; some rows end early.
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "length_penalty": 0.7}
    board = Switchboard(model)
    skip, keep = random_decisions(board, batch, length, seed, rate)
    keep = keep if drop else None
    with board.decide(skip, keep):
        cached = model.generate(**prompt, **arguments)
        again = model.generate(**prompt, **arguments)
        uncached = model.generate(**prompt, **arguments, use_cache=False)
    assert torch.equal(cached, again)
    assert torch.equal(cached, uncached)
    for row in range(batch):
        with board.decide(skip[row : row + 1], None if keep is None else keep[row : row + 1]):
            alone = model.generate(**row_of(prompt, row), **arguments)[0]
        assert torch.equal(cached[row][: len(alone)], alone)
        assert (cached[row][len(alone) :] == 1).all()  # padding


@pytest.mark.parametrize("name", GENERATING)
def test_logits_over_a_cache_are_those_without_within_noise(name):
    model = make_model(name)
    inputs = make_inputs(name, side="left" if name in DECODER else "right")
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    board = Switchboard(model)
    skip, keep = random_decisions(board, 5, 7, 0)
    arguments = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with board.decide(skip, keep):
        cached = model.generate(**prompt, **arguments).logits
        uncached = model.generate(**prompt, **arguments, use_cache=False).logits
    torch.testing.assert_close(torch.stack(cached), torch.stack(uncached), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mbart", "llama"])
def test_sampling_with_a_seed_is_the_same_with_and_without_cache(name):
    model = make_model(name)
    inputs = make_inputs(name, side="left" if name in DECODER else "right")
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    board = Switchboard(model)
    arguments = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}
    samples = []
    with board.decide(random_decisions(board, 5, 7, 0)[0]):
        for use_cache in (True, True, False):
            torch.manual_seed(3)
            samples.append(model.generate(**prompt, **arguments, use_cache=use_cache))
    assert len(samples[0]) == 10
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


class _Stream:
    """A stream of a device that this machine may not have."""

    def __init__(self, *_):
        pass

    def wait_stream(self, _):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("name", ["llama", "mistral", "bart"])
def test_an_offloaded_cache_generates_as_any_other(name, monkeypatch):
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", _Stream)
    model, inputs = make_model(name), make_inputs(name, batch=2, side="left" if name in DECODER else "right")
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    board = Switchboard(model)
    with board.decide(random_decisions(board, 2, 7, 0)[0]):
        for beams in (1, 3):
            arguments = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
            offloaded = model.generate(**prompt, **arguments, cache_implementation="offloaded")
            assert torch.equal(offloaded, model.generate(**prompt, **arguments))
