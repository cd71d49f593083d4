"""A policy attached to a model: each row of each call is decided on, and nothing else changes."""

import copy
import pickle
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, TextIteratorStreamer

import sd_gym
from sd_gym.backbones.heads import head_of
from sd_gym.inference.attach import attach, detach
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.switch import FlopsModel, Switchboard
from tests.conftest import DECODER, ENCODER, ENCODER_DECODER, make_inputs, make_model, row_of
from tests.devices import MPS, Devices, place, spread
from tests.inference.conftest import make_policy

ALL = [*ENCODER, *DECODER, *ENCODER_DECODER]
GENERATING = [*DECODER, *ENCODER_DECODER]


def judging(model, policy, inputs):
    """FLOPs of the head's own judgements, of each input."""
    board = Switchboard(model)
    times = sum(stage != "first" for stage in policy.network.stages) if head_of(model).can_exit(board) else 0
    length = inputs["attention_mask"].sum(dim=1).numpy()
    always = FlopsModel(board).costs(length, length)[0]
    board.remove()
    return times * always


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


def expected(model, policy, inputs):
    """What a switchboard gives under the policy's decisions, by hand."""
    board = Switchboard(model)
    seen = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    decisions = policy.decide(board, seen)
    keep = policy.kept(board, seen, decisions[:, -1])
    with board.decide(decisions[:, :-1], keep):
        result = logits(model, inputs)
    board.remove()
    return decisions, result


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_row_of_padding_alone_saves_nothing(name):
    model, inputs = make_model(name), make_inputs(name)
    inputs["attention_mask"][0] = 0
    attach(model, make_policy(model))
    logits(model, inputs)
    assert model.decisions.flops_ratio[0] == 1
    assert (model.decisions.flops_ratio[1:] < 1).any()


def test_padded_at_the_left_a_pooled_position_is_padding_with_a_policy_as_without():
    model, inputs = make_model("bert"), make_inputs("bert")
    padded = {name: value.flip(1) for name, value in inputs.items()}
    assert not padded["attention_mask"][:, 0].all()
    wanted = logits(model, padded)
    attach(model, make_policy(model, dense=True))
    torch.testing.assert_close(logits(model, padded), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_a_call_decides_for_each_row_as_the_policy_does(name):
    model, inputs = make_model(name), make_inputs(name)
    policy = make_policy(model)
    decisions, wanted = expected(model, policy, inputs)
    assert len(np.unique(decisions, axis=0)) > 1
    assert attach(model, policy) is model
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=0, atol=0)
    np.testing.assert_array_equal(model.decisions.skip, decisions[:, :-1])
    for row in range(5):  # a batch is each row alone
        np.testing.assert_allclose(logits(model, row_of(inputs, row))[0], wanted[row], atol=1e-5)
        np.testing.assert_array_equal(model.decisions.skip, decisions[row : row + 1, :-1])


def test_the_policy_sees_the_token_types_that_the_model_reads():
    """Also if its env had none, as sd_gym.load and exports do."""
    model, inputs = make_model("bert"), make_inputs("bert")
    policy, board, plain = make_policy(model), Switchboard(model), dict(inputs)
    inputs["token_type_ids"] = inputs["attention_mask"] * (torch.arange(inputs["input_ids"].shape[1]) > 2)
    wanted, without = (policy.decide(board, one) for one in (inputs, plain))
    board.remove()
    assert (wanted != without).any()
    attach(model, policy)
    logits(model, inputs)
    np.testing.assert_array_equal(model.decisions.skip, wanted[:, :-1])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranking", [None, "position", "attention"])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_call_decides_at_the_stages_of_its_pass(name, ranking, tokens):
    model, inputs = make_model(name), make_inputs(name)
    shares = {"shares": (0.0, 0.5), "ranking": ranking} if ranking else {}
    policy = make_policy(model, stages=["every_layer"], seed=3, tokens=tokens, **shares)
    attach(model, policy)
    came = logits(model, inputs)
    decided = model.decisions.skip.copy(), model.decisions.token_level.copy()
    assert len(np.unique(decided[0], axis=0)) > 1
    for row in range(5):  # a batch is each row alone
        np.testing.assert_allclose(logits(model, row_of(inputs, row))[0], came[row], atol=1e-5)
        np.testing.assert_array_equal(model.decisions.skip, decided[0][row : row + 1])
        np.testing.assert_array_equal(model.decisions.token_level, decided[1][row : row + 1])
    detach(model)
    board = Switchboard(model)
    seen = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with board.decide(decided[0], policy.kept(board, seen, decided[1])):
        torch.testing.assert_close(logits(model, inputs), came, rtol=0, atol=0)
    with pytest.raises(ValueError, match="decides during the pass, at first"):
        policy.decide(board, seen)


@pytest.mark.parametrize("name", ALL)
def test_with_the_dense_policy_and_after_detaching_the_model_is_untouched(name):
    model, inputs = make_model(name), make_inputs(name)
    before, attributes = logits(model, inputs), set(vars(model))
    attach(model, make_policy(model, dense=True))
    assert torch.equal(logits(model, inputs), before)
    np.testing.assert_array_equal(model.decisions.flops_ratio, 1)
    attach(model, make_policy(model))
    assert not torch.equal(logits(model, inputs), before)
    assert detach(model) is model
    assert torch.equal(logits(model, inputs), before)
    assert set(vars(model)) == attributes
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="no policy is attached"):
        detach(model)


@pytest.mark.parametrize("stages", [["first"], ["every_layer"]], ids=["once", "staged"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_torch_compile_leaves_the_model_as_it_is(mode, stages):
    """Compiled under each decision anew it would take minutes, and fail in inference mode."""
    model, inputs = make_model("bert"), make_inputs("bert")
    attach(model, make_policy(model, stages=stages))
    wanted, counter = logits(model, inputs), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with mode():
        assert torch.equal(compiled(**inputs).logits, wanted)
    assert counter.frame_count == 0


def test_a_forward_that_was_compiled_before_is_decided_on_and_put_back():
    model, inputs, counter = make_model("bert"), make_inputs("bert"), CompileCounter()
    policy = make_policy(model)
    attach(model, policy)
    wanted = logits(model, inputs)
    detach(model)
    compiled = model.forward = torch.compile(model.forward, backend=counter)
    attach(model, policy)
    assert torch.equal(logits(model, inputs), wanted)
    assert model.decisions.skip.any()
    assert counter.frame_count == 0
    assert detach(model).forward is compiled


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize(
    ("stages", "tokens"),
    [(["first"], False), (["every_layer"], False), (["every_layer"], True)],
    ids=["once", "staged", "staged-on-tokens"],
)
def test_generation_decides_on_the_prompt(name, how, stages, tokens):
    side = "left" if name in DECODER else "right"
    model, inputs = make_model(name), make_inputs(name, side=side)
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    policy, settings = (
        make_policy(model, stages=stages, tokens=tokens),
        {"max_new_tokens": 4, "do_sample": False, **how},
    )
    rows = how.get("num_return_sequences", 1)
    attach(model, policy)
    texts = model.generate(**prompts, **settings)
    skip, ratio = model.decisions.skip, model.decisions.flops_ratio
    assert len(np.unique(skip, axis=0)) > 1
    assert (ratio < 1).any()
    for row in range(5):  # alone, and without padding: each row is decided on as in the batch
        present = prompts["attention_mask"][row].bool()
        alone = {"input_ids": prompts["input_ids"][row : row + 1, present]}
        text = model.generate(**alone, attention_mask=torch.ones_like(alone["input_ids"]), **settings)
        np.testing.assert_array_equal(model.decisions.skip[0], skip[row])
        start = (len(present), int(present.sum())) if name in DECODER else (0, 0)
        length = min(texts.shape[1] - start[0], text.shape[1] - start[1])
        ours = texts[row * rows : (row + 1) * rows, start[0] : start[0] + length]
        assert torch.equal(ours, text[:, start[1] : start[1] + length])
    sampled = model.generate(**prompts, max_new_tokens=3, do_sample=True)
    assert len(sampled) == 5
    np.testing.assert_array_equal(model.decisions.skip, skip)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_generation_without_a_mask_infers_it_as_the_model_does(name):
    side = "left" if name in DECODER else "right"
    model, inputs = make_model(name), make_inputs(name, side=side)
    attach(model, make_policy(model))
    masked = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3)
    skip = model.decisions.skip
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=3), masked)
    np.testing.assert_array_equal(model.decisions.skip, skip)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranking", ["position", "idf", "attention"])
def test_tokens_are_dropped_as_the_policy_says(name, ranking):
    model, inputs = make_model(name), make_inputs(name)
    policy = make_policy(model, shares=(0.0, 0.5), ranking=ranking, seed=3)
    decisions, wanted = expected(model, policy, inputs)
    assert decisions[:, -1].any()
    attach(model, policy)
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=0, atol=0)
    np.testing.assert_array_equal(model.decisions.token_level, decisions[:, -1])
    assert (model.decisions.flops_ratio[decisions[:, -1] > 0] < 1).all()


@pytest.mark.parametrize("name", ENCODER_DECODER)
@pytest.mark.parametrize("ranking", ["position", "attention"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_after_an_encoder_looks_and_decides_in_its_pass(name, ranking, how):
    model, inputs = make_model(name), make_inputs(name)
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    settings, encoded = {"max_new_tokens": 4, "do_sample": False, **how}, []
    policy = make_policy(model, shares=(0.0, 0.5), ranking=ranking, seed=3)
    board = Switchboard(model)
    decisions = policy.decide(board, prompts)
    with board.decide(decisions[:, :-1], policy.kept(board, prompts, decisions[:, -1])):
        wanted = model.generate(**prompts, **settings)
    board.remove()
    assert decisions[:, -1].any()
    attach(model, policy)
    model.get_encoder().register_forward_pre_hook(lambda *_: encoded.append(1))
    assert torch.equal(model.generate(**prompts, **settings), wanted)
    assert len(encoded) == (1 if ranking == "position" else 2)  # to rank by attention takes another look
    np.testing.assert_array_equal(model.decisions.skip, decisions[:, :-1])
    np.testing.assert_array_equal(model.decisions.token_level, decisions[:, -1])


@pytest.mark.parametrize("name", DECODER)
def test_padding_at_the_left_is_decided_on_like_padding_at_the_right(name):
    model = make_model(name)
    right, left = make_inputs(name), make_inputs(name, side="left")
    left["input_ids"] = torch.stack(
        [row.roll(int(7 - mask.sum())) for row, mask in zip(right["input_ids"], right["attention_mask"], strict=True)]
    )
    policy = make_policy(model, shares=(0.0, 0.5), seed=3)
    attach(model, policy)
    prompts = [{key: one[key] for key in ("input_ids", "attention_mask")} for one in (right, left)]
    skips = []
    for one in prompts:
        model(**one, use_cache=False)
        skips.append((model.decisions.skip, model.decisions.token_level, model.decisions.flops_ratio))
    for ours, theirs in zip(*skips, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("stages", [["first"], ["every_layer"]], ids=["once", "staged"])
def test_a_users_decoding_loop_goes_on_under_what_was_decided_on_the_prompt(name, stages):
    model, inputs = make_model(name), make_inputs(name, batch=1)
    attach(model, make_policy(model, stages=stages))
    ids = inputs["input_ids"]
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)[0, 7:]
    skip, cache, tokens = model.decisions.skip, DynamicCache(config=model.config), []
    with torch.inference_mode():
        for _ in range(3):
            last = model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=False)[0][:, -1:]
            last[:, :, model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
            ids = last.argmax(dim=-1)
            tokens.append(int(ids))
    np.testing.assert_array_equal(model.decisions.skip, skip)
    assert tokens == wanted.tolist()
    foreign = DynamicCache(config=model.config)
    detach(model)
    model(input_ids=inputs["input_ids"], past_key_values=foreign, use_cache=True)
    attach(model, make_policy(model))
    with pytest.raises(ValueError, match="was not filled by the attached model"):
        model(input_ids=ids, past_key_values=foreign, use_cache=True)


def test_threads_have_their_own_decisions():
    model = make_model("bert")
    policy = make_policy(model)
    batches = [make_inputs("bert", seed=seed) for seed in range(6)]
    attach(model, policy)
    wanted = [(logits(model, one), model.decisions.skip) for one in batches]
    wrong = []

    def work(number):
        for _ in range(20):
            same = torch.equal(logits(model, batches[number]), wanted[number][0])
            if not same or (model.decisions.skip != wanted[number][1]).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("stages", [["first"], ["every_layer"]], ids=["once", "staged"])
def test_a_policy_is_not_removed_in_the_middle_of_a_call_of_another_thread(stages):
    model, inputs = make_model("bert"), make_inputs("bert")
    attach(model, make_policy(model, stages=stages))
    wanted, came, inside, done = logits(model, inputs), [], threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert done.wait(20)

    hook = model.bert.encoder.layer[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: came.append(logits(model, inputs)))
    thread.start()
    assert inside.wait(20)
    with pytest.raises(RuntimeError, match="a call or decide\\(\\) block is still running"):
        detach(model)
    done.set()
    thread.join()
    hook.remove()
    assert torch.equal(came[0], wanted)
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda *_: _no_place(None, None))
    with pytest.raises(RuntimeError, match="no place"):
        logits(model, inputs)
    detach(model)  # no call runs


def test_a_forward_that_accelerate_has_made_a_method_decides_and_is_removed():
    model, inputs = make_model("bert"), make_inputs("bert")
    dense = logits(model, inputs)
    attach(model, make_policy(model))
    wanted = logits(model, inputs)
    model._original_forward = model.forward  # as Accelerator(mixed_precision="bf16").prepare(model) does
    model.forward = convert_outputs_to_fp32(model.forward)
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(logits(model, inputs), wanted)
    assert torch.equal(model(*inputs.values()).logits, wanted)
    assert torch.equal(logits(detach(model), inputs), dense)


def test_a_users_decisions_come_first():
    model, inputs = make_model("bert"), make_inputs("bert")
    dense = logits(model, inputs)
    attach(model, make_policy(model))
    board = model._switchboard
    with board.decide(np.zeros((1, len(board)))):
        assert torch.equal(logits(model, inputs), dense)


def test_a_streamer_gets_the_text(tiny_tokenizer):
    model = make_model("llama")
    attach(model, make_policy(model))
    ids = torch.tensor([[4, 5, 6]])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=20)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=settings)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tiny_tokenizer.decode(wanted[0, 3:]).split()


def test_threads_that_stream_at_once_are_not_told_that_they_generate_densely():
    model, ids, texts = make_model("llama"), torch.tensor([[4, 5, 6]]), []
    attach(model, make_policy(model))

    def stream(put):
        streamer = SimpleNamespace(put=put, end=lambda: None)
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
        texts.append(model.generate(ids, streamer=streamer, **settings))

    def stream_in_thread(_):
        if not texts:
            thread = threading.Thread(target=stream, args=(lambda _: None,))
            thread.start()
            thread.join()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*generates densely")
        stream(stream_in_thread)
    assert torch.equal(*texts)


def test_a_streamers_reader_does_not_wait_for_a_call_that_is_refused(tiny_tokenizer):
    model, embeds = make_model("llama"), torch.zeros(1, 3, 16)
    attach(model, make_policy(model))
    streamer = TextIteratorStreamer(tiny_tokenizer, timeout=20)
    with pytest.raises(ValueError, match="decides by its input_ids"):
        model.generate(inputs_embeds=embeds, max_new_tokens=4, streamer=streamer)
    assert "".join(streamer) == ""
    with pytest.raises(RuntimeError, match="no place"):
        model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=4, streamer=streamer, logits_processor=[_no_place])
    assert list(streamer)  # the prompt
    assert streamer.text_queue.empty()  # it was ended once


def _no_place(ids, scores):
    raise RuntimeError("no place")


@torch.inference_mode()
def test_a_users_steps_go_on_from_the_cache_of_generate():
    model, ids = make_model("llama"), torch.tensor([[4, 5, 6]])
    attach(model, make_policy(model))
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    longer = model.generate(ids, max_new_tokens=6, min_new_tokens=6, **settings)
    settings |= {"max_new_tokens": 4, "min_new_tokens": 4}
    begun, given = model.generate(ids, return_dict_in_generate=True, **settings), DynamicCache(config=model.config)
    assert torch.equal(model.generate(ids, past_key_values=given, **settings), begun.sequences)
    with pytest.raises(ValueError, match="generate\\(\\) begins with an empty cache"):
        model.generate(begun.sequences, past_key_values=given, max_new_tokens=2)
    for name, cache in (("past_key_values", begun.past_key_values), ("cache", given)):  # the old name and the new one
        tokens = begun.sequences
        for _ in range(2):
            output = model(input_ids=tokens[:, -1:], **{name: cache})
            tokens = torch.cat([tokens, output.logits[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(tokens, longer)


def test_what_cannot_work_is_refused():
    model, inputs = make_model("bert"), make_inputs("bert")
    policy = make_policy(model)
    with pytest.raises(ValueError, match="this policy is for a bert"):
        attach(make_model("roberta"), policy)
    other = make_model("bert")
    with torch.no_grad():
        other.classifier.bias += 1
    with pytest.raises(ValueError, match="the weights are not those"):
        attach(other, policy)
    attach(other, policy, check_weights=False)
    for wrapped in (torch.compile(other, backend="eager"), torch.nn.DataParallel(other)):
        with pytest.raises(TypeError, match=f"got a {type(wrapped).__name__}; attach first"):
            attach(wrapped, policy)
    deeper = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="the model has 8 switches"):
        attach(deeper, policy)
    attach(model, policy)
    with pytest.raises(ValueError, match="decides by its input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="got inputs_embeds"):
        model(**inputs, inputs_embeds=torch.zeros(5, 7, 16))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="detach"):
            copied(model)
    protected = make_policy(model, shares=(0.0, 0.5), seed=3)
    attach(model, SkipPolicy(**{**vars(protected), "protection": None}))
    with pytest.raises(ValueError, match="call it on texts"):
        model(**inputs)


def test_a_model_that_peft_wraps_is_attached_again_and_banked():
    peft = pytest.importorskip("peft")
    inputs, policies = make_inputs("llama"), [make_policy(make_model("llama"), seed=seed) for seed in (1, 2)]
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    plain = copy.deepcopy(model)
    for policy in policies:
        attach(model, policy, check_weights=False)
        np.testing.assert_array_equal(logits(model, inputs), expected(plain, policy, inputs)[1])
    with pytest.raises(RuntimeError, match="to a wrapper of this model or to the model inside; detach it first"):
        attach(model.base_model.model, policies[0], check_weights=False)
    mask = model.decisions.skip[0]
    (own,), (theirs,) = sd_gym.bank(model, [mask]), sd_gym.bank(plain, [mask])
    assert torch.equal(logits(own, inputs), logits(theirs, inputs))
    board = Switchboard(plain)
    attach(plain, policies[1], check_weights=False)
    assert torch.equal(logits(plain, inputs), logits(model, inputs))
    detach(plain)
    attach(plain.base_model.model, policies[0], check_weights=False)
    with pytest.raises(RuntimeError, match="to a wrapper of this model or to the model inside; detach it first"):
        attach(plain, policies[0], check_weights=False)
    detach(plain.base_model.model)
    board.remove()


def test_weights_that_are_offloaded_are_no_weights_to_compare():
    policy = make_policy(make_model("bert"))
    model = make_model("bert").to("meta")
    with pytest.raises(ValueError, match=r"the weights are offloaded, .* attach first, then offload, or"):
        attach(model, policy)


def test_after_a_call_a_model_is_pickled_only_without_a_policy():
    model, inputs = make_model("llama"), make_inputs("llama")
    board = Switchboard(model)
    attach(model, make_policy(model))
    model.generate(**inputs, max_new_tokens=2)
    logits(model, inputs)
    with pytest.raises(TypeError, match="detach"):
        pickle.dumps(model)
    detach(model)
    loaded = pickle.loads(pickle.dumps(model))
    board.remove()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_what_an_encoder_has_run_densely_is_refused(name):
    model, inputs = make_model(name), make_inputs(name)
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    encoded = model.get_encoder()(**prompts)
    attach(model, make_policy(model))
    with pytest.raises(ValueError, match="runs the whole pass; got encoder_outputs"):
        model.generate(**prompts, encoder_outputs=encoded, max_new_tokens=3)
    with pytest.raises(ValueError, match="runs the whole pass; got encoder_outputs"):
        model(**inputs, encoder_outputs=encoded)


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, {}) for name in ["bert", "distilbert", "llama", "gpt2", "bart", "t5"]), ("llama", {"logits_to_keep": 3})],
)
@pytest.mark.parametrize("stages", [["first"], ["every_layer"]], ids=["once", "staged"])
def test_flops_are_those_that_a_counter_counts(name, how, stages):
    """Of several stages nothing runs twice, but for the head."""
    model, inputs = make_model(name, "eager"), {**make_inputs(name, batch=4), **how}
    policy, counted = make_policy(model, stages=stages), {}
    own = policy.network.flops + judging(model, policy, inputs)
    for dense in (True, False):
        counted[dense] = []
        if not dense:
            attach(model, policy)
        for row in range(4):
            alone = row_of(inputs, row)
            length = int(alone["attention_mask"].sum())
            alone |= {key: alone[key][:, :length] for key in ("input_ids", "attention_mask")}
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(**alone)
            counted[dense].append(counter.get_total_flops() - (0 if dense else own[row]))
    logits(model, inputs)
    wanted = np.array(counted[False]) / np.array(counted[True])
    np.testing.assert_allclose(model.decisions.flops_ratio, wanted)
    assert (wanted < 1).any()


@torch.no_grad()
def test_the_same_pass_in_other_arguments_has_the_same_flops():
    model, inputs = make_model("bart"), make_inputs("bart")
    start = inputs.pop("decoder_input_ids")[:, :1]
    embedded = model.get_input_embeddings()(start)
    attach(model, make_policy(model))
    model(**inputs, decoder_input_ids=start)
    ratio = model.decisions.flops_ratio
    model(**inputs, decoder_inputs_embeds=embedded)
    np.testing.assert_array_equal(model.decisions.flops_ratio, ratio)
    model, inputs = make_model("llama"), make_inputs("llama")
    attach(model, make_policy(model))
    model(**inputs, logits_to_keep=1)
    ratio = model.decisions.flops_ratio
    model(**inputs, logits_to_keep=torch.tensor([inputs["input_ids"].shape[1] - 1]))
    np.testing.assert_array_equal(model.decisions.flops_ratio, ratio)


def test_a_policy_is_not_attached_while_a_decision_is_in_force():
    model = make_model("t5")
    policy, board = make_policy(model), Switchboard(model)
    with board.decide(np.ones((1, len(board)))), pytest.raises(RuntimeError, match="still running on this model"):
        attach(model, policy)
    assert "_attached" not in vars(model)
    attach(model, policy)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_a_decoder_is_counted_for_each_beam(how):
    model, inputs = make_model("bart"), make_inputs("bart")
    attach(model, make_policy(model))
    texts = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=4, **how)
    source = inputs["attention_mask"].sum(dim=1).numpy()
    always, switched = FlopsModel(model._switchboard).costs(source, np.full(5, texts.shape[1] - 1), beams=3)
    ran = always + (switched * ~model.decisions.skip).sum(axis=1)
    np.testing.assert_allclose(model.decisions.flops_ratio, ran / (always + switched.sum(axis=1)))


@pytest.mark.parametrize("stages", [["first"], ["first", "answer"]])
def test_an_export_of_an_attached_model_is_refused(stages):
    model, inputs = make_model("bert"), make_inputs("bert")
    attach(model, make_policy(model, stages=stages))
    with pytest.raises(NotImplementedError, match="exported model cannot decide in the pass"):
        torch.export.export(model, (), inputs, strict=False)


def test_continuous_batching_is_refused():
    model = make_model("llama")
    attach(model, make_policy(model))
    with pytest.raises(NotImplementedError, match=r"without decisions; call generate\(\), or sd_gym.detach"):
        model.init_continuous_batching()  # as generate_batch() does


@pytest.mark.parametrize("stages", [["first"], ["every_layer"]], ids=["once", "staged"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_prompt_is_read_in_chunks_unless_the_policy_decides_while_it_is_read(name, stages):
    model, ids = make_model(name), torch.tensor([[4, 5, 6, 7, 8]])
    attach(model, make_policy(model, stages=stages))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    if name == "llama" and stages != ["first"]:
        with pytest.raises(ValueError, match="leave prefill_chunk_size=2 out"):
            model.generate(ids, prefill_chunk_size=2, **settings)
    else:
        whole = model.generate(ids, **settings)
        assert torch.equal(model.generate(ids, prefill_chunk_size=2, **settings), whole)


@pytest.mark.parametrize(
    ("name", "stages", "devices"),
    [
        ("bert", ("first", "encoder.1", "answer"), 1),
        ("bert", ("first", "encoder.1", "answer"), 2),
        ("llama", ("first",), 2),
        ("bart", ("first", "answer"), 2),
    ],
)
@torch.inference_mode()
def test_a_policy_decides_on_other_devices_as_on_the_cpu(name, stages, devices):
    """On one without float64, with the inputs; or on two, with the inputs on the CPU."""
    model, inputs = make_model(name), make_inputs(name, side="left" if name == "llama" else "right")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    policy = make_policy(model, stages=stages)

    def answer():
        attach(model, policy)
        output = model.generate(**inputs, max_new_tokens=3) if name == "bart" else model(**inputs).logits
        skip, went_on = model.decisions.skip, model.decisions.went_on
        detach(model)
        return output, skip, went_on

    output, skip, went_on = answer()
    assert went_on.any() == ("answer" in stages)
    with Devices():
        if devices == 1:
            place(model, MPS)
            inputs = {key: value.to(MPS) for key, value in inputs.items()}
        else:
            spread(model, [path for path, _ in model.named_modules() if path.endswith(("layer.1", "layers.1"))])
        found = answer()
        assert torch.equal(found[0].cpu(), output)
    np.testing.assert_array_equal(found[1], skip)
    np.testing.assert_array_equal(found[2], went_on)
