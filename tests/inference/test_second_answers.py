"""A policy that looks at the answer: rows that it does not accept run on densely, and nothing of them runs twice."""

from functools import cache

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_gym.agents.experiment.export import export
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification, GenerationConfig, TextStreamer

import sd_gym
from sd_gym.going_on import masks_and_goes_on
from sd_gym.inference.attach import attach, detach
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.token_rule import TokenRule
from sd_gym.switch import Switchboard
from tests.conftest import TINY, make_extractor, make_inputs, make_model, row_of
from tests.envs.conftest import looking
from tests.inference.conftest import make_policy

SWITCHES = 6


def scripted(model, masks, levels, goes_on, stages=("first", "answer"), shares=(0.0, 0.5)):
    """A policy that decides what is given here, of the batch that it is called on."""
    policy = make_policy(model, stages=[*stages], shares=shares)
    policy.network.decide = lambda shown: np.column_stack([masks, levels, goes_on])
    return policy


def classifier(name, attention="sdpa"):
    torch.manual_seed(0)
    special = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model(name, **special, **TINY[name])
    return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()


@torch.inference_mode()
def logits(model, inputs):
    output = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], dim=1)


def expected(model, policy, inputs, masks, levels, goes_on):
    """Under the masks, and densely: two whole passes."""
    board, dense = Switchboard(model), logits(model, inputs)
    with board.decide(masks, policy.kept(board, inputs, np.array(levels))):
        first = logits(model, inputs)
    board.remove()
    return torch.where(torch.from_numpy(goes_on).view(-1, *[1] * (dense.ndim - 1)), dense, first)


@st.composite
def decisions(draw, n=5):
    masks = np.array(draw(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=n, max_size=n)))
    levels = np.array(draw(st.lists(st.sampled_from([0, 0, 1]), min_size=n, max_size=n)))
    return masks, levels, np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))


@cache
def tiny(stages):
    """A model, and a policy for it."""
    model = make_model("bert")
    return model, make_policy(model, stages=stages, shares=(0.0, 0.5))


@settings(max_examples=25, deadline=None)
@given(decisions(), st.sampled_from([("first",), ("first", "encoder.1"), ("every_layer",)]), st.booleans())
def test_any_rows_go_on_from_any_layer_and_the_others_stay(drawn, stages, left):
    (model, policy), inputs = tiny((*stages, "answer")), make_inputs("bert", side="left" if left else "right")
    masks, levels, goes_on = drawn
    levels = levels * (not left)  # the rule of what is protected is for texts padded at the right
    policy.network.decide = lambda shown: np.column_stack([masks, levels, goes_on])
    wanted = expected(model, policy, inputs, masks, levels, goes_on)
    attach(model, policy)
    try:
        torch.testing.assert_close(logits(model, inputs), wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(model.decisions.skip, masks)
        np.testing.assert_array_equal(model.decisions.went_on, goes_on & (masks.any(axis=1) | (levels > 0)))
    finally:
        detach(model)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "bart"])
@pytest.mark.parametrize("dropping", [False, True])
def test_a_batch_of_mixed_decisions_is_each_row_alone_and_dense_to_the_bit_where_it_goes_on(name, dropping):
    model, inputs = classifier(name), make_inputs("bert")
    inputs["input_ids"][:, 0] = 3  # what ends an input of a BART stands once in each
    inputs["input_ids"][:, 1:][inputs["input_ids"][:, 1:] == 3] = 4
    board = Switchboard(model)
    size = len(board)
    board.remove()
    random = np.random.default_rng(0)
    masks = (random.random((5, size)) < 0.4).astype(int)
    masks[0, :4], masks[0, -1], masks[1] = 0, 1, 0  # row 0 goes on from a later layer, row 1 has skipped nothing
    levels, goes_on = np.array([0, 0, 0, 1, 1]) * dropping, np.array([True, True, False, True, False])
    policy = scripted(model, masks, levels, goes_on)
    wanted = expected(model, policy, inputs, masks, levels, goes_on)
    dense = [logits(model, row_of(inputs, row)) for row in range(5)]
    attach(model, policy)
    together = logits(model, inputs)
    torch.testing.assert_close(together, wanted, rtol=1e-4, atol=1e-4)
    ratio = model.decisions.flops_ratio
    assert (ratio[[0, 3]] > 1).all()
    assert ratio[1] == 1
    assert (ratio[[2, 4]] < 1).all()
    for row in range(5):
        one = slice(row, row + 1)
        policy.network.decide = lambda shown, one=one: np.column_stack([masks, levels, goes_on])[one]
        alone = logits(model, row_of(inputs, row))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone, dense[row]) or not goes_on[row]
        np.testing.assert_allclose(model.decisions.flops_ratio, ratio[one])


def test_each_row_runs_again_from_its_first_skipped_layer_and_no_earlier():
    model, inputs = make_model("bert"), make_inputs("bert")
    masks = np.zeros((5, SWITCHES), dtype=int)
    masks[0, 1], masks[1, 2], masks[2, 5], masks[3, 4], masks[4, 2:] = 1, 1, 1, 1, 1
    goes_on, called = np.array([True, True, True, False, True]), []
    attach(model, scripted(model, masks, np.zeros(5, dtype=int), goes_on, shares=(0.0,)))
    for number, layer in enumerate(model.bert.encoder.layer):
        attention = layer.attention.self
        attention.register_forward_hook(lambda _, args, output, number=number: called.append((number, len(output[0]))))
    logits(model, inputs)
    first, again = called[:3], called[3:]
    assert first == [(0, 5), (1, 3), (2, 3)]
    # Row 0 from the start, rows 1 and 4 from the second layer, row 2 from the third one.
    assert again == [(0, 1), (1, 1), (2, 1), (1, 2), (2, 2), (2, 1)]


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
@pytest.mark.parametrize("dropping", [False, True])
def test_flops_are_those_that_a_counter_counts(name, dropping):
    model, inputs = classifier(name, "eager"), make_inputs("bert", batch=1)
    inputs["input_ids"][:, -1] = 3  # what a BART ends with
    size = {"bert": 6, "gpt2": 6, "bart": 10}[name]
    mask, counted = np.zeros((1, size), dtype=int), []
    mask[:, 2], mask[:, -1] = 1, 1
    policy = scripted(model, mask, [int(dropping)], [True])
    for attached in (False, True):
        if attached:
            attach(model, policy)
        with FlopCounterMode(display=False) as counter:
            logits(model, inputs)
        counted.append(counter.get_total_flops())
    np.testing.assert_allclose(model.decisions.flops_ratio, counted[1] / counted[0])
    assert counted[1] > counted[0]


@torch.inference_mode()
@pytest.mark.parametrize("start", [[4, 5, 6, 7], torch.tensor([4, 5, 6, 7])])
def test_rows_that_go_on_keep_their_own_first_token(start):
    """Such as the language of a text."""
    model, inputs = make_model("mbart"), make_inputs("mbart", batch=4)
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 3, "do_sample": False, "decoder_start_token_id": start}
    dense, goes_on = model.generate(**prompts, **how), np.array([True, False, True, False])
    board = Switchboard(model)
    size = len(board)
    board.remove()
    attach(model, scripted(model, np.ones((4, size), dtype=int), np.zeros(4, dtype=int), goes_on, shares=(0.0,)))
    texts = model.generate(**prompts, **how)
    assert texts[:, 0].tolist() == [4, 5, 6, 7]
    assert torch.equal(texts[goes_on], dense[goes_on])


@pytest.mark.parametrize(("name", "beams"), [("bart", 1), ("t5", 3), ("llama", 1), ("llama", 2)])
def test_a_text_is_written_again_densely_on_what_the_encoder_has_read(name, beams):
    lone = name == "llama"
    model, inputs = make_model(name), make_inputs(name, side="left" if lone else "right")
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    board = Switchboard(model)
    size, encoder = len(board), 0 if lone else board.decided_at(["first", "decoder"])["decoder"].start
    board.remove()
    masks = np.zeros((5, size), dtype=int)
    masks[:3, encoder + 1 :: 2] = 1  # of the first three rows the encoder has run all
    masks[3, ::2] = 1
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    how["prefix_allowed_tokens_fn"] = lambda row, ids: [3, 10 + row, 20 + row, 30 + row]  # those of the row
    goes_on = np.array([True, False, True, True, True])
    policy = scripted(model, masks, np.zeros(5, dtype=int), goes_on, shares=(0.0,))
    board = Switchboard(model)
    with board.decide(masks):
        first = model.generate(**prompts, **how)
    board.remove()
    dense, read = model.generate(**prompts, **how), []
    attach(model, policy)
    if not lone:
        stack = model.get_encoder()
        layer = (stack.layers if name == "bart" else stack.block)[0]
        layer.register_forward_hook(lambda _, args, output: read.append(len(output[0])))
    came = model.generate(**prompts, **how)
    for row in range(5):
        wanted = (dense if goes_on[row] else first)[row]
        length = min(len(wanted), came.shape[1])
        assert torch.equal(came[row, :length], wanted[:length])
        assert set(came[row, length:].tolist()) | set(wanted[length:].tolist()) <= {1}
    assert len(read) == (0 if lone else 2)  # for all, and for the row of which something was skipped there
    np.testing.assert_array_equal(model.decisions.went_on, goes_on & masks.any(axis=1))
    assert (model.decisions.flops_ratio[[0, 2, 3]] > 1).all()
    assert model.decisions.flops_ratio[4] == 1  # it has skipped nothing, so nothing ran again


@settings(max_examples=40, deadline=None)
@given(
    decisions(),
    st.sampled_from(["llama", "gpt2", "qwen2", "mistral"]),
    st.sampled_from([{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}]),
    st.sampled_from([("first",), ("first", "decoder.1"), ("every_layer",)]),
)
def test_a_text_is_written_again_densely_on_what_of_its_prompt_is_dense(drawn, name, how, stages):
    model, inputs = make_model(name), make_inputs(name, side="left")
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    how, (masks, levels, goes_on) = {"max_new_tokens": 6, "do_sample": False, **how}, drawn
    dense = [model.generate(**row_of(prompts, row), **how)[0] for row in range(5)]
    texts = []
    for again in (goes_on & False, goes_on):
        attach(model, scripted(model, masks, levels, again, (*stages, "answer")))
        texts.append(model.generate(**prompts, **how))
        detach(model)
    for row, wanted in enumerate(dense):
        for came, right in ((texts[1][row], wanted if goes_on[row] else texts[0][row]),):
            length = min(len(came), len(right))
            assert torch.equal(came[7:length], right[7:length])
            assert set(came[length:].tolist()) | set(right[length:].tolist()) <= {1}


@pytest.mark.parametrize("stages", [("first", "decoder"), ("first", "decoder.1"), ("every_layer",), ("decoder.1",)])
@pytest.mark.parametrize("name", ["bart", "marian"])
def test_a_text_is_written_again_where_the_decoder_first_skips_at_a_later_stage(name, stages):
    model, inputs = make_model(name), make_inputs(name)
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    dense = model.generate(**prompts, max_new_tokens=6)
    board = Switchboard(model)
    names = board.names
    board.remove()
    masks = np.zeros((5, len(names)), dtype=int)
    masks[:4] = [switch.startswith("decoder.1.") for switch in names]
    if stages != ("decoder.1",):
        masks[0, names.index("encoder.0.attention")] = masks[1, names.index("decoder.0.attention")] = 1
    goes_on = np.array([True, True, True, False, True])
    policy = scripted(model, masks, np.zeros(5, dtype=int), goes_on, (*stages, "answer"), shares=(0.0,))
    came = attach(model, policy).generate(**prompts, max_new_tokens=6)
    assert torch.equal(came[goes_on], dense[goes_on])
    assert not torch.equal(came[3], dense[3])
    np.testing.assert_array_equal(model.decisions.went_on, goes_on & masks.any(axis=1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_prompt_is_read_again_from_its_first_skipped_layer_and_no_earlier(name):
    model, inputs = make_model(name), make_inputs(name, side="left")
    masks, ran = np.zeros((5, SWITCHES), dtype=int), []
    masks[0, 1], masks[1, 2], masks[2, 5], masks[3, 4], masks[4, 3] = 1, 1, 1, 1, 1
    levels, goes_on = np.array([0, 0, 0, 1, 0]), np.array([True, True, True, True, False])
    policy = scripted(model, masks, levels, goes_on)
    for switch in attach(model, policy)._attached.board.switches[::2]:
        switch.modules[0].register_forward_pre_hook(
            lambda _, args, number=switch.index: ran.append((number, *args[0].shape[:2]))
        )
    model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2, min_new_tokens=2)
    prompts = [(number, rows) for number, rows, positions in ran if positions > 1]
    # Rows 0 and 3, which drops tokens, from the start; row 1 from the second layer, row 2 from the third one.
    assert prompts == [(0, 5), (1, 5), (2, 5), (0, 2), (1, 2), (2, 2), (1, 1), (2, 1), (2, 1)]
    steps = [(number, rows) for number, rows, positions in ran if positions == 1]
    assert steps[3:] == [(number, rows) for rows in (2, 1, 1) for number in range(3)]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_flops_of_texts_are_those_that_a_counter_counts(name, beams, tokens):
    model, inputs = make_model(name, "eager"), make_inputs(name, batch=1)
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": beams, "do_sample": False}
    mask, counted = np.zeros((1, SWITCHES), dtype=int), []
    mask[:, 3:] = 1
    policy = scripted(model, mask, [0], [True])
    for attached in (False, True):
        if attached:
            attach(model, policy)
        with FlopCounterMode(display=False) as counter:
            model.generate(inputs["input_ids"], **how)
        # A pass over prompt and answer would have more pairs of positions than the steps of generating.
        of = counter.get_flop_counts()["Global"]
        counted.append(sum(flops for name, flops in of.items() if "bmm" not in str(name) or tokens == 1))
    if tokens > 1:
        model._attached._flops._per_pair[:] = 0
    np.testing.assert_allclose(model.decisions.flops_ratio, counted[1] / counted[0])
    assert model.decisions.resumed == [2]


def test_what_a_generation_config_leaves_open_is_the_models():
    model, inputs = make_model("bart"), make_inputs("bart")
    model.generation_config.num_return_sequences = 2
    attach(model, make_policy(model, stages=["first", "answer"]))
    with pytest.raises(ValueError, match="expected num_return_sequences=1, got 2"):
        model.generate(inputs["input_ids"], generation_config=GenerationConfig(max_new_tokens=5))
    model.generation_config.num_return_sequences = 1
    came = [
        model.generate(inputs["input_ids"], **how)
        for how in ({"max_new_tokens": 5}, {"generation_config": GenerationConfig(max_new_tokens=5)})
    ]
    assert torch.equal(*came)  # without a mask, which is inferred from the padding


def test_the_mini_backbone_writes_on_texts_what_it_writes_in_the_env():
    keys = {"train_size": 60, "validation_size": 20, "test_size": 16}
    core = gym.make("SD/Summarization-Mini-v0", **keys, stages=["first", "decoder", "answer"]).unwrapped.core
    policy = looking(core, bias=2.0)  # runs most
    split, every = core.split("test"), np.arange(16)
    decisions = core.rollout(split, every, policy.decide)[0]
    masks, went_on = masks_and_goes_on(decisions, len(core.mask_nvec))
    assert 0 < went_on.sum() < 16
    quality, dense = split.scoring.quality(every, decisions)
    assert (quality[went_on] == dense[went_on]).all()
    model = sd_gym.load(export(core, policy, (), {}))
    came = model([one.source for one in split.instances])
    inputs = split.passes.inputs(every)
    written = model.model.generate(inputs["input_ids"], max_new_tokens=core.config.backbone.max_target_length)
    said = model.tokenizer.batch_decode(written, skip_special_tokens=True)
    assert [one.answer for one in came] == [text.strip() for text in said]
    right = [one.answer == known.target for one, known in zip(came, split.instances, strict=True)]
    np.testing.assert_array_equal(quality, right)
    for of_each in ([one.skip for one in came], model.model.decisions.skip):
        np.testing.assert_array_equal(of_each, masks[:, :-1])
    for of_each in ([one.went_on for one in came], model.model.decisions.went_on):
        np.testing.assert_array_equal(of_each, went_on)


def test_a_span_is_judged_in_its_context():
    model = make_extractor("bert")
    inputs = make_inputs("bert")
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 0)
    inputs["input_ids"][:, 1] = 2  # the end of the question
    policy = make_policy(model, stages=["first", "answer"])
    with pytest.raises(ValueError, match="are the context of a question"):
        logits(attach(model, policy), inputs)
    policy = SkipPolicy(**{**vars(policy), "context": TokenRule((0, 1, 2), 0, 0, 2)})
    policy.network.head.bias.data[-1] += 1000  # all rows go on
    attach(model, policy)
    came = logits(model, inputs)
    assert model.decisions.skip.any(axis=1).all()
    assert model.decisions.went_on.all()
    detach(model)
    torch.testing.assert_close(came, logits(model, inputs), rtol=1e-4, atol=1e-4)


def test_calls_that_ask_for_more_than_an_answer_are_refused(tiny_tokenizer):
    model, inputs = make_model("bert"), make_inputs("bert")
    attach(model, make_policy(model, stages=["first", "answer"]))
    with pytest.raises(ValueError, match="gives logits alone; leave out labels"):
        model(**inputs, labels=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="leave out output_hidden_states"):
        model(**inputs, output_hidden_states=True)
    assert isinstance(model(inputs["input_ids"], inputs["attention_mask"], return_dict=False), tuple)
    model, inputs = make_model("bart"), make_inputs("bart")
    attach(model, make_policy(model, stages=["first", "answer"]))
    with pytest.raises(ValueError, match=r"judges texts .* call model.generate"):
        model(**inputs)
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    for name, value in (("logits_processor", [lambda ids, scores: scores]), ("stopping_criteria", [lambda *_: False])):
        with pytest.raises(ValueError, match=f"the rows of a batch change for your {name}; leave it out"):
            model.generate(**prompts, max_new_tokens=3, **{name: value})
    with pytest.raises(ValueError, match=r"not up to stop_strings; give eos_token_id instead"):
        model.generate(**prompts, max_new_tokens=3, stop_strings=["a"], tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match=r"which custom_generate replaces; leave it out"):
        model.generate(**prompts, max_new_tokens=3, custom_generate=lambda model, input_ids, **_: input_ids)
    for name, value in (
        ("num_return_sequences", 2),
        ("return_dict_in_generate", True),
        ("streamer", TextStreamer(tiny_tokenizer)),
    ):
        with pytest.raises(ValueError, match=f"one text per input, after all are complete; expected {name}="):
            model.generate(**prompts, max_new_tokens=3, **{name: value})
