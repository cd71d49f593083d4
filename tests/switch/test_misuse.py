"""Misuse of the switchboard: exact, or refused with what to do; never wrong in silence."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, EncoderDecoderCache

from sd_gym.switch import StaleBoardError, Switchboard, UnsupportedArchitectureError
from tests.conftest import DECODER, ENCODER_DECODER, TINY, make_inputs, make_model, row_of

KINDS = ["bert", "mbart", "llama"]


@pytest.fixture(params=list(TINY))
def name(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def mixed(board, batch, seed=0):
    """Decisions by which every row skips something, and no two rows the same."""
    skip = np.random.default_rng(seed).random((batch, len(board))) < 0.5
    skip[:, 0] = np.arange(batch) % 2
    return skip


def logits(board, skip, inputs, keep=None):
    with torch.inference_mode(), board.decide(skip, keep):
        return board.model(**inputs).logits


def each_row_is_as_alone(board, skip, inputs, model=None, **tolerance):
    """Whether a batch of mixed decisions is each row alone, and differs from the dense one."""
    model = model or board.model
    counted = inputs["attention_mask"].bool() if model.config.model_type in DECODER else None
    with torch.inference_mode():
        dense = model(**inputs).logits
        with board.decide(skip):
            together = model(**inputs).logits
        assert together.isfinite().all()
        assert not torch.equal(together, dense)
        for row in range(len(skip)):
            with board.decide(skip[row : row + 1]):
                alone = model(**row_of(inputs, row)).logits[0]
            rows = slice(None) if counted is None else counted[row]
            torch.testing.assert_close(together[row][rows], alone[rows], rtol=1e-4, atol=1e-4)


# --- other rows -------------------------------------------------------------------------------------------------------


def test_bad_decisions_are_refused(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    n = len(board)
    zeros = np.zeros((5, n), int)
    with pytest.raises(ValueError, match=rf"\[batch, {n}\].*got \[5, {n + 1}\]"), board.decide(torch.zeros(5, n + 1)):
        pass
    with pytest.raises(ValueError, match="skip must hold only 0"), board.decide(np.full((5, n), 2)):
        pass
    with pytest.raises(ValueError, match="keep is for 4 rows and skip for 5"), board.decide(zeros, np.ones((4, 7))):
        pass
    with pytest.raises(ValueError, match="without any token"), board.decide(zeros, np.zeros((5, 7))):
        pass
    with board.decide(torch.ones(4, n, dtype=torch.long)), pytest.raises(ValueError, match=r"4 rows.*got 5"):
        model(**inputs)


@torch.inference_mode()
def test_other_rows_than_those_decided_on_are_refused(name):
    """Also as many as a multiple of them: they are other rows all the same."""
    model, inputs = make_model(name), make_inputs(name, batch=8)
    board = Switchboard(model)
    for column in range(len(board)):
        skip = np.zeros((4, len(board)), int)
        skip[1:, column] = 1
        with board.decide(skip), pytest.raises(ValueError, match=r"for 4 rows, but the model got 8; give a row of"):
            model(**inputs)


@torch.inference_mode()
def test_a_single_row_of_decisions_stands_for_all(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    skip = mixed(board, 1, seed=3)
    keep = np.array([[1, 1, 0, 1, 0, 1, 1]])
    for kept in (None, keep):
        every = None if kept is None else np.repeat(kept, 5, axis=0)
        assert torch.equal(logits(board, skip, inputs, kept), logits(board, np.repeat(skip, 5, axis=0), inputs, every))


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


@torch.inference_mode()
def test_tokens_of_an_input_of_another_length_are_refused(name):
    model, inputs = make_model(name), make_inputs(name, source=16)
    board = Switchboard(model)
    for length in (9, 17):
        keep = np.ones((5, length), int)
        keep[:, 3] = 0
        with (
            board.decide(np.zeros((5, len(board)), int), keep),
            pytest.raises(ValueError, match=rf"inputs of {length} tokens.*got 16; give keep a column for each"),
        ):
            model(**inputs)


# --- caches -----------------------------------------------------------------------------------------------------------


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


def fresh_cache(name):
    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if name in ENCODER_DECODER else DynamicCache()


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


# --- stale boards -----------------------------------------------------------------------------------------------------


def quantised(model, inplace=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=inplace)


def test_a_replaced_module_is_noticed_and_a_new_board_is_exact(name):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    switch = board.switches[1]
    path, old = switch.sublayer.modules[0], switch.modules[0]
    parent, _, child = path.rpartition(".")
    setattr(switch.layer.get_submodule(parent), child, copy.deepcopy(old))
    with pytest.raises(StaleBoardError, match=rf"{path} was replaced.*make a new Switchboard"):
        board.decide(mixed(board, 5))
    board.remove()
    board = Switchboard(model)
    each_row_is_as_alone(board, mixed(board, 5), inputs)
    layers = model.base_model.get_submodule(board.architecture.stacks[0].layers)
    layers[1] = copy.deepcopy(layers[0])
    with pytest.raises(StaleBoardError, match="1 was replaced"):
        board.decide(mixed(board, 5))


def test_a_forward_that_another_tool_puts_in_place_is_called_or_noticed(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    module, calls = board.switches[0].modules[0], []

    def wrap():
        before = module.forward
        module.forward = lambda *args, **kwargs: (calls.append(1), before(*args, **kwargs))[1]
        return module.forward

    mine = wrap()
    each_row_is_as_alone(board, mixed(board, 5), inputs)
    assert calls
    assert module.forward is mine
    with board.decide(mixed(board, 5)):
        theirs = wrap()  # in front of the switchboard, which cannot give its place back
    with pytest.raises(StaleBoardError, match=r"forward\(\) of a"):
        board.decide(mixed(board, 5))
    board.remove()
    assert module.forward is theirs
    board = Switchboard(model)
    each_row_is_as_alone(board, mixed(board, 5), inputs)


def test_a_removed_board_decides_no_more():
    board = Switchboard(make_model("bert"))
    board.remove()
    with pytest.raises(StaleBoardError, match=r"removed.*new Switchboard"):
        board.decide(np.ones((1, len(board))))


def test_a_copy_of_the_model_does_not_ignore_decisions(kind):
    """Quantisation copies: decisions on the original would be ignored by the copy."""
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    skip = mixed(board, 5)
    expected = logits(board, skip, inputs)
    copies = [copy.deepcopy(model), quantised(model)]
    for copied in copies:
        with torch.inference_mode(), board.decide(skip):
            with pytest.raises(StaleBoardError, match=r"is a copy.*make a Switchboard of the copy"):
                copied(**inputs)
            assert torch.equal(model(**inputs).logits, expected)
    own = [Switchboard(copied) for copied in copies]
    assert torch.equal(logits(own[0], skip, inputs), expected)
    dense = model(**inputs).logits
    with own[0].decide(skip):
        assert torch.equal(model(**inputs).logits, dense)
    with torch.inference_mode():
        every = np.ones((5, len(board)))
        assert not torch.equal(logits(own[1], every, inputs), copies[1](**inputs).logits)


def test_quantising_in_place_is_noticed_where_it_replaces_what_is_switched():
    model, inputs = make_model("mbart"), make_inputs("mbart")
    board = Switchboard(model)
    quantised(model, inplace=True)
    with pytest.raises(StaleBoardError, match=r"fc1 was replaced.*make a new Switchboard"):
        board.decide(mixed(board, 5))
    board.remove()
    board = Switchboard(model)
    skip = np.ones((5, len(board)))
    assert not torch.equal(logits(board, skip, inputs), model(**inputs).logits)


def test_boards_are_copied_and_pickled_with_their_models(kind):
    board, inputs = Switchboard(make_model(kind)), make_inputs(kind)
    skip = mixed(board, 5)
    expected = logits(board, skip, inputs)
    for other in (copy.deepcopy(board), pickle.loads(pickle.dumps(board))):
        assert torch.equal(logits(other, skip, inputs), expected)
        other.remove()
        assert not any(
            {"forward", "generate", "_switchboard"} & vars(module).keys() for module in other.model.modules()
        )
    assert torch.equal(logits(board, skip, inputs), expected)


@pytest.mark.parametrize("targets", [["query", "dense"], ["q_proj", "fc1", "fc2"], ["v_proj", "down_proj"]])
def test_adapters_are_switched_exactly_or_refused(targets):
    peft = pytest.importorskip("peft")
    name = KINDS[[["query", "dense"], ["q_proj", "fc1", "fc2"], ["v_proj", "down_proj"]].index(targets)]
    inputs = make_inputs(name)

    def adapted(model):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
        for path, weight in model.named_parameters():
            if "lora_B" in path:
                nn.init.normal_(weight, std=0.3)
        return model.eval()

    model = adapted(make_model(name))
    board = Switchboard(model)  # of the model inside
    each_row_is_as_alone(board, mixed(board, 5), inputs, model)
    model = make_model(name)
    board = Switchboard(model)
    model = adapted(model)
    if name == "mbart":  # its switched linears are replaced
        with pytest.raises(StaleBoardError, match="make a new Switchboard"):
            board.decide(mixed(board, 5))
        board.remove()
        board = Switchboard(model)
    each_row_is_as_alone(board, mixed(board, 5), inputs, model)


def test_sentence_transformers_are_refused_by_name():
    modules = pytest.importorskip("sentence_transformers")
    model = modules.SentenceTransformer(modules=[nn.Identity()])
    with pytest.raises(TypeError, match=r"SentenceTransformer sorts its texts.*model\[0\].auto_model.*single row"):
        Switchboard(model)


def test_a_wrapped_model_is_unwrapped_and_anything_else_refused():
    model, inputs = make_model("bert"), make_inputs("bert")
    wrapped = nn.ModuleDict({"module": model})
    board = Switchboard(wrapped)
    assert board.model is model
    assert torch.equal(logits(board, 0 * mixed(board, 5), inputs), model(**inputs).logits)
    for wrong in (nn.Linear(2, 2), "bert-base-uncased"):
        with pytest.raises(TypeError, match=rf"needs a Hugging Face model.*got a {type(wrong).__name__}"):
            Switchboard(wrong)


def test_a_second_switchboard_is_refused():
    model = make_model("bert")
    Switchboard(model)
    with pytest.raises(RuntimeError, match="remove"):
        Switchboard(model)


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    model = BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedArchitectureError, match=r"'bloom'.*bart, bert, distilbert.*register_architecture"):
        Switchboard(model)


# --- what runs the model in another way -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_compiled_models_follow_decisions(kind, attention):
    model, inputs = make_model(kind, attention), make_inputs(kind)
    board = Switchboard(model)
    decisions = [mixed(board, 5, seed) for seed in range(2)]
    with torch.inference_mode():
        dense = model(**inputs).logits
        expected = [logits(board, skip, inputs) for skip in decisions]
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(compiled(**inputs).logits, dense)
            for skip, right in zip(decisions, expected, strict=True):
                with board.decide(skip):
                    assert torch.equal(compiled(**inputs).logits, right)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_decision_is_one_for_all_rows_or_refused(strict):
    model, inputs = make_model("bert"), make_inputs("bert")
    board = Switchboard(model)
    other = make_inputs("bert", batch=3, seed=1)
    batch = {key: {0: torch.export.Dim.DYNAMIC} for key in inputs}

    def export(*decision):
        with torch.no_grad(), board.decide(*decision):
            return torch.export.export(model, (), inputs, dynamic_shapes=batch, strict=strict).module()

    single = mixed(board, 1)
    torch.testing.assert_close(export(single)(**other).logits, logits(board, single, other))
    for decision in ((mixed(board, 5),), (0 * single, np.array([[1, 1, 0, 1, 1, 1, 1]]))):
        with pytest.raises(Exception, match="traced or exported model would keep the decisions"):
            export(*decision)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_decision_is_one_for_all_rows_or_refused():
    model, inputs = make_model("bert"), make_inputs("bert")
    model.config.return_dict = False
    board = Switchboard(model)
    other = make_inputs("bert", batch=3, seed=1)

    def trace(skip):
        with torch.no_grad(), board.decide(skip):
            return torch.jit.trace(model, tuple(inputs.values()), check_trace=False)

    single = mixed(board, 1)
    with torch.no_grad(), board.decide(single):
        expected = model(*other.values())[0]
    torch.testing.assert_close(trace(single)(*other.values())[0], expected)
    with pytest.raises(NotImplementedError, match="traced or exported model would keep the decisions of these 5 rows"):
        trace(mixed(board, 5))


def test_flex_attention_is_refused_before_it_runs(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    model.set_attn_implementation("flex_attention")
    keep = np.ones((5, 7), int)
    keep[:, 2] = 0
    for skip, kept in ((mixed(board, 5), None), (0 * mixed(board, 5), keep)):
        with pytest.raises(NotImplementedError, match=r"set_attn_implementation\('sdpa'\)"):
            logits(board, skip, inputs, kept)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_refused_while_it_is_on(name, reentrant):
    model, inputs = make_model(name), make_inputs(name)
    board = Switchboard(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    keep = np.ones((5, 7), int)
    keep[:, 2] = 0
    for skip, kept in ((mixed(board, 5), None), (0 * mixed(board, 5), keep)):
        with (
            board.decide(skip, kept),
            pytest.raises(NotImplementedError, match=r"gradient_checkpointing_disable\(\)"),
        ):
            model(**inputs)
    model.gradient_checkpointing_disable()
    with board.decide(mixed(board, 5)):
        model(**inputs).logits.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("drop", [True, False])
def test_checkpointing_by_hand_around_a_model_under_a_decision_is_refused(kind, reentrant, drop):
    """In the backward pass it would run densely, or under what is decided there."""
    model, inputs = make_model(kind), make_inputs(kind)
    board = Switchboard(model)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    skip, keep = mixed(board, 5), np.ones((5, 7), int)
    keep[:, 2] = 0
    decision = (0 * skip, keep) if drop else (skip,)

    def run(embedded):
        return model(inputs_embeds=embedded, **inputs).logits

    def gradient(output):
        return torch.autograd.grad(output.pow(2).sum(), embedded)[0]

    def replayed(function):
        return checkpoint(function, embedded, use_reentrant=reentrant)

    with board.decide(*decision):
        expected = gradient(run(embedded))
        with pytest.raises(NotImplementedError, match=r"runs layers again in the backward pass.*decide inside"):
            replayed(run)
    dense = replayed(run)
    with board.decide(*decision), pytest.raises(NotImplementedError, match="runs layers again"):
        dense.pow(2).sum().backward()

    def inside(embedded):
        with board.decide(*decision):
            return run(embedded)

    output = replayed(inside)
    output.pow(2).sum().backward()
    torch.testing.assert_close(embedded.grad, expected)
