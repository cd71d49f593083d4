"""Exact invariants of switching, on every supported architecture."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import sd_gym.switch.architectures
import sd_gym.switch.switchboard
from sd_gym.switch import FlopsModel, Switchboard, UnsupportedArchitectureError, supported_architectures
from tests.conftest import make_inputs, make_model

MODELS = ["bart", "mbart", "bert"]
SWITCHES = {"bart": 2 * 2 + 2 * 3, "mbart": 2 * 2 + 2 * 3, "bert": 3 * 2}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.inference_mode()
def test_nothing_skipped_is_the_untouched_model_bit_for_bit(name, attention):
    model, inputs = make_model(name, attention), make_inputs(name)
    untouched = model(**inputs, output_hidden_states=True)
    keys = list(model.state_dict())
    board = Switchboard(model)
    assert len(board) == SWITCHES[name]
    assert list(model.state_dict()) == keys
    with board.decide(torch.zeros(5, len(board), dtype=torch.long)):
        decided = model(**inputs, output_hidden_states=True)
    board.remove()
    removed = model(**inputs, output_hidden_states=True)
    for outputs in (decided, removed):
        assert torch.equal(outputs.logits, untouched.logits)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not hasattr(model, "_switchboard")
    assert len(model._forward_pre_hooks) == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([0.1, 0.5, 0.9]), batch=st.integers(1, 6))
def test_a_batch_of_mixed_decisions_is_each_row_alone(attention, seed, rate, batch):
    for name in MODELS:
        model, inputs = make_model(name, attention), make_inputs(name, batch=batch, seed=seed)
        board = Switchboard(model)
        skip = torch.rand(batch, len(board), generator=torch.Generator().manual_seed(seed)) < rate
        with torch.inference_mode():
            with board.decide(skip):
                together = model(**inputs).logits
            for row in range(batch):
                alone_inputs = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
                with board.decide(skip[row : row + 1]):
                    alone = model(**alone_inputs).logits
                torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_skipped_sublayer_is_never_called_and_sees_only_the_rows_that_run_it(name):
    model, inputs = make_model(name, "eager"), make_inputs(name)
    query = {"bart": "self_attn.q_proj", "mbart": "self_attn.q_proj", "bert": "attention.self.query"}[name]
    seen = {}

    def record(switch_name):
        return lambda module, args: seen.setdefault(switch_name, []).append(len(args[0]))

    board = Switchboard(model)
    for switch in board.switches:
        if switch.sublayer.kind == "attention":
            switch.layer.get_submodule(query).register_forward_pre_hook(record(switch.name))
        elif switch.sublayer.kind == "feed_forward" and name == "bert":
            switch.layer.intermediate.dense.register_forward_pre_hook(record(switch.name))
    skip = torch.zeros(5, len(board), dtype=torch.long)
    skip[:, 0] = 1
    skip[[0, 3], 1] = 1
    skip[1:, 2] = 1
    with board.decide(skip), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert board.names[0] not in seen
    for switch, column in zip(board.switches, skip.T, strict=True):
        if switch.name in seen:
            assert seen[switch.name] == [5 - int(column.sum())]
    # Bare linears have nothing inside to hook on, but the counter sees every product that is computed. Padded rows run
    # at full length.
    always, switched = FlopsModel(board).costs(np.full(5, 7), np.full(5, 4))
    assert counter.get_total_flops() == (always + (switched * (1 - skip.numpy())).sum(axis=1)).sum()


@torch.inference_mode()
def test_everything_skipped_still_gives_an_output(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    with board.decide(torch.ones(5, len(board), dtype=torch.long)):
        assert torch.isfinite(model(**inputs).logits).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), source=st.integers(2, 20), target=st.integers(1, 12))
def test_analytic_flops_are_counted_flops(seed, source, target):
    for name in MODELS:
        model = make_model(name, "eager")
        inputs = make_inputs(name, batch=1, source=source, target=target, seed=seed)
        board = Switchboard(model)
        skip = torch.rand(1, len(board), generator=torch.Generator().manual_seed(seed)) < 0.5
        with torch.inference_mode(), board.decide(skip), FlopCounterMode(display=False) as counter:
            model(**inputs)
        always, switched = FlopsModel(board).costs(np.array([source]), np.array([target]))
        assert counter.get_total_flops() == always[0] + (switched[0] * ~skip[0].numpy()).sum()


def test_gradients_reach_only_what_ran(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = torch.zeros(5, len(board), dtype=torch.long)
    skip[:, 0] = 1
    skip[:3, 1] = 1
    with board.decide(skip):
        model(**inputs).logits.sum().backward()
    assert all(p.grad is None for p in board.switches[0].modules[0].parameters())
    assert all(p.grad is not None for p in board.switches[1].modules[0].parameters())


def test_attention_weights_of_skipped_rows_are_zero():
    model, inputs = make_model("mbart", "eager"), make_inputs("mbart")
    board = Switchboard(model)
    skip = torch.zeros(5, len(board), dtype=torch.long)
    skip[2, 0] = 1
    with torch.inference_mode(), board.decide(skip):
        first = model(**inputs, output_attentions=True).encoder_attentions[0]
    assert first.shape[0] == 5
    assert (first[2] == 0).all()
    assert (first[1].sum(-1) > 0.99).all()


def test_decisions_nest_and_end_with_their_block(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    ones = torch.ones(5, len(board), dtype=torch.long)
    with torch.inference_mode():
        dense = model(**inputs).logits
        with board.decide(ones):
            skipped = model(**inputs).logits
            with board.decide(0 * ones):
                assert torch.equal(model(**inputs).logits, dense)
            assert torch.equal(model(**inputs).logits, skipped)
        assert torch.equal(model(**inputs).logits, dense)


def test_bad_decisions_are_refused(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    n = len(board)
    with pytest.raises(ValueError, match=rf"\[batch, {n}\].*got \[5, {n + 1}\]"), board.decide(torch.zeros(5, n + 1)):
        pass
    with pytest.raises(ValueError, match="only 0"), board.decide(np.full((5, n), 2)):
        pass
    with board.decide(torch.ones(4, n, dtype=torch.long)), pytest.raises(ValueError, match=r"4 rows.*got 5"):
        model(**inputs)


def test_a_second_switchboard_is_refused():
    model = make_model("bert")
    Switchboard(model)
    with pytest.raises(RuntimeError, match="remove"):
        Switchboard(model)


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedArchitectureError, match=r"'gpt2'.*bart, bert, mbart.*register_architecture"):
        Switchboard(model)
    assert supported_architectures() == ["bart", "bert", "mbart"]


def test_decoding_over_a_cache_is_refused_under_decisions_and_works_without_cache():
    model = make_model("mbart")
    inputs = make_inputs("mbart")
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    arguments = {"max_new_tokens": 5, "do_sample": False, "num_beams": 1, "decoder_start_token_id": 2}
    dense = model.generate(**prompt, **arguments)
    board = Switchboard(model)
    assert torch.equal(model.generate(**prompt, **arguments), dense)
    skip = torch.zeros(5, len(board), dtype=torch.long)
    skip[::2, [1, 5]] = 1
    with board.decide(skip):
        with pytest.raises(NotImplementedError, match="use_cache=False"):
            model.generate(**prompt, **arguments)
        mixed = model.generate(**prompt, **arguments, use_cache=False)
    assert torch.equal(mixed[1::2], dense[1::2])


def test_docstring_examples_run():
    for module in (sd_gym.switch.switchboard, sd_gym.switch.architectures):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0
