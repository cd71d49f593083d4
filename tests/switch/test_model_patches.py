"""Whole layers, encoders and ``generate()`` under a decision."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sd_gym.switch import Switchboard
from tests.conftest import DECODER, ENCODER_DECODER, make_inputs, make_model
from tests.switch.conftest import mixed, random_decisions


@pytest.mark.parametrize("name", ENCODER_DECODER + DECODER)
def test_generate_repeats_a_row_for_its_beams_and_samples_and_nothing_else(name):
    model, inputs = make_model(name), make_inputs(name, batch=4, side="left" if name in DECODER else "right")
    board = Switchboard(model)
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    length = {"max_new_tokens": 2, "min_new_tokens": 2}
    skip = mixed(board, 4)
    for settings in ({"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}):
        with board.decide(skip):
            tokens = model.generate(**prompt, **length, **settings, do_sample=False)
        assert len(tokens) == 4 * settings.get("num_return_sequences", 1)
    for rows, beams in ((2, 1), (2, 2), (8, 2)):
        with (
            board.decide(mixed(board, rows)),
            pytest.raises(ValueError, match=rf"for {rows} rows, but the model got [48]"),
        ):
            model.generate(**prompt, **length, num_beams=beams, do_sample=False)


@pytest.mark.parametrize("end", [0, -1])  # of an encoder-decoder, a layer of each
@torch.inference_mode()
def test_a_layer_that_no_row_runs_is_passed_by(name, end):
    """But for norms after its residual sums; what it shows is what it showed when it was called."""
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = random_decisions(board, 5, 7, 0)[0]
    places = [(switch.stack, switch.index) for switch in board.switches]
    skip[:, [place == places[end] for place in places]] = 1
    layer, called = board.switches[end].layer, []
    for norm in (module for module in layer.modules() if isinstance(module, nn.LayerNorm)):
        norm.weight.uniform_(0.5, 2.0)  # untrained ones are all alike, in whatever order they run
    layer.forward = lambda *args, **kwargs: (called.append(1), type(layer).forward(layer, *args, **kwargs))[1]
    passed_by = name != "t5"

    def run():
        called.clear()
        with board.decide(skip):
            outputs = model(**inputs, output_hidden_states=True)
        assert len(called) == 1 - passed_by
        shown = ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")
        return outputs.logits, *(states for name in shown for states in outputs.get(name) or ())

    outputs = run()
    board._patches.idle, board._plans, passed_by = lambda skipped, resumes: frozenset(), {}, False
    assert all(torch.equal(one, other) for one, other in zip(outputs, run(), strict=True))


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_gradients_reach_the_encoder_after_a_pass_without_them(name):
    """The rows of the encoder's output are taken once without gradients, and never used with them."""
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = np.zeros((5, len(board)), int)
    skip[0] = [not switch.reads_input for switch in board.switches]  # mixed in every sublayer of the decoder
    gradients = []
    for warm_up in (False, True):
        with board.decide(skip):
            encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
            inner = {"encoder_outputs": encoded, **{key: inputs[key] for key in inputs if key != "input_ids"}}
            if warm_up:
                with torch.no_grad():
                    model(**inner)
            model.zero_grad()
            model(**inner).logits.sum().backward()
        gradients.append([p.grad for path, p in model.named_parameters() if "encoder." in path and p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_continuous_batching_is_refused_under_a_decision():
    model = make_model("llama")
    board = Switchboard(model)
    with (
        board.decide(mixed(board, 1)),
        pytest.raises(NotImplementedError, match=r"generate_batch\(\).*without decisions; call generate\(\)"),
    ):
        model.init_continuous_batching()  # as generate_batch() does


@pytest.mark.parametrize("name", ["llama", "mbart"])
def test_who_decides_while_the_prompt_is_read_sees_all_of_it(name):
    """Some models read it in parts; encoder-decoders read only what is generated in parts."""
    model, inputs = make_model(name), make_inputs(name, side="left" if name in DECODER else "right")
    board = Switchboard(model)
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    config = copy.deepcopy(model.generation_config)
    config.prefill_chunk_size = 3
    seen = []

    def choose(state):
        seen.append(state.hidden.shape[1])
        return mixed(board, 5), None

    def generate(*args, **settings):
        with board.decide_in_pass(choose):
            return model.generate(*args, **prompt, **settings, max_new_tokens=2, do_sample=False)

    whole = generate()
    for args, settings in (((), {"prefill_chunk_size": 3}), ((), {"generation_config": config}), ((None, config), {})):
        if name in DECODER:
            with pytest.raises(ValueError, match="as a whole; leave prefill_chunk_size=3 out"):
                generate(*args, **settings)
        else:
            assert torch.equal(generate(*args, **settings), whole)
    model.generation_config = config
    assert torch.equal(generate(prefill_chunk_size=None), whole)
    if name in DECODER:
        with pytest.raises(ValueError, match="leave prefill_chunk_size=3 out"):
            generate()
        with board.decide(mixed(board, 5)):
            assert torch.equal(model.generate(**prompt, max_new_tokens=2, do_sample=False), whole)
    assert set(seen) == {7}
