"""Deciding in stages, and stopping a pass at a stage: exact on every architecture."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from sd_gym.switch import FlopsModel, Switchboard, first_layer_input
from tests.conftest import DECODER, ENCODER_DECODER, TINY, make_inputs, make_model, row_of
from tests.switch.conftest import GENERATING, Synchronisations, random_decisions

LATE = {**dict.fromkeys(TINY, "encoder.2"), **dict.fromkeys(ENCODER_DECODER, "decoder.1")}
LATE |= dict.fromkeys(DECODER, "decoder.2")


class Case:
    """A batch, its decisions, and what is given to a pass that decides them in stages."""

    def __init__(self, name, seed=0, drop=False, rate=0.5, batch=4, side="right", attention="sdpa"):
        self.board = Switchboard(make_model(name, attention))
        self.inputs = make_inputs(name, batch=batch, seed=seed, side=side)
        self.prompt = {key: self.inputs[key] for key in ("input_ids", "attention_mask")}
        self.skip, keep = random_decisions(self.board, batch, 7, seed, rate)
        self.keep = keep if drop else None
        self.seen = []

    def in_stages(self, stages, rows=slice(None)):
        """A block that decides at the stages what is decided anyway."""
        columns = self.board.decided_at(stages)

        def choose(seen):
            self.seen.append(seen)
            keep = self.keep[rows] if self.keep is not None and seen.stage == "first" else None
            return self.skip[rows][:, columns[seen.stage]], keep

        return self.board.decide_in_pass(choose, stages, self.inputs["attention_mask"][rows])

    def model(self, rows=None):
        inputs = self.inputs if rows is None else row_of(self.inputs, rows)
        return self.board.model(**inputs).logits


def some_stages(board, seed):
    """Any stages, ``first`` among them."""
    chosen = np.random.default_rng(seed).random(len(board.stages)) < 0.6
    return ["first", *(stage for stage, is_in in zip(board.stages[1:], chosen[1:], strict=True) if is_in)]


def test_stages_are_named_by_stack_and_layer():
    assert Switchboard(make_model("bert")).stages == ["first", "encoder.1", "encoder.2"]
    assert Switchboard(make_model("llama")).stages == ["first", "decoder.1", "decoder.2"]
    board = Switchboard(make_model("mbart"))
    assert board.stages == ["first", "encoder.1", "decoder", "decoder.1"]
    assert board.decided_at(["decoder", "first"]) == {"first": slice(0, 4), "decoder": slice(4, 10)}
    assert list(board.decided_at(["every_layer"])) == board.stages
    assert list(board.decided_at(["first", "middle"])) == ["first", "encoder.1"]


def test_unknown_stages_are_named():
    board = Switchboard(make_model("bert"))
    for wrong in (["encoder.3"], ["encoder.0"], ["decoder"]):
        with pytest.raises(ValueError, match=r"there is no stage.*choose from \['first', 'encoder.1'"):
            board.decide_in_pass(lambda seen: None, wrong)
    for wrong in ([], "first"):
        with pytest.raises(ValueError, match="must be a list of one or more names"):
            board.decided_at(wrong)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(list(TINY)),
    seed=st.integers(0, 10_000),
    drop=st.booleans(),
    rate=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    side=st.sampled_from(["left", "right"]),
)
@torch.inference_mode()
def test_a_staged_pass_is_the_pass_under_the_same_decisions_and_each_row_alone(name, seed, drop, rate, side):
    case = Case(name, seed, drop, rate, side=side if name in DECODER else "right")
    board, stages = case.board, some_stages(Switchboard(make_model(name)), seed)
    with board.decide(case.skip, case.keep):
        expected = case.model()
    with case.in_stages(stages):
        together = case.model()
        assert torch.equal(together, expected)
        assert torch.equal(case.model(), expected)  # holds to the end of the block
    assert [seen.stage for seen in case.seen] == stages
    assert not board._scope.family.needs
    assert not any("forward" in vars(module) for module in board.model.modules())
    for row in range(4):
        with case.in_stages(stages, slice(row, row + 1)):
            alone = case.model(row)[0]
        counted = slice(None)
        if name in DECODER:
            counted = case.inputs["attention_mask"][row].bool()
            counted = counted if case.keep is None else counted & torch.from_numpy(case.keep[row])
        torch.testing.assert_close(together[row][counted], alone[counted], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_layers_before_the_first_stage_are_dense(name):
    case = Case(name)
    late = LATE[name]
    case.skip[:, : case.board.decided_at([late])[late].start] = False
    with case.board.decide(case.skip):
        expected = case.model()
    with case.in_stages([late]):
        assert torch.equal(case.model(), expected)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(GENERATING),
    seed=st.integers(0, 10_000),
    drop=st.booleans(),
    rate=st.sampled_from([0.0, 0.3, 0.9]),
    arguments=st.sampled_from(
        [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}]
    ),
)
def test_generating_decides_on_the_prompt_and_keeps_that(name, seed, drop, rate, arguments):
    case = Case(name, seed, drop, rate, side="left" if name in DECODER else "right")
    stages = some_stages(case.board, seed)
    arguments = {"max_new_tokens": 6, "do_sample": False, **arguments}

    def generate():
        torch.manual_seed(3)
        return case.board.model.generate(**case.prompt, **arguments)

    with case.board.decide(case.skip, case.keep):
        expected = generate()
    for _ in range(2):
        with case.in_stages(stages):
            assert torch.equal(generate(), expected)
    assert [seen.stage for seen in case.seen] == 2 * stages
    assert all(len(seen.hidden) == len(seen.mask) == 4 for seen in case.seen)  # a row an input, not a beam


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("name", DECODER)
@torch.inference_mode()
def test_a_cache_of_a_staged_pass_is_gone_on_with_under_its_whole_decision(name, rate):
    case = Case(name, rate=rate, side="left")
    if rate:
        case.skip[:, :2] = False  # nothing is skipped where the cache begins
    more = torch.full((4, 1), 5)
    mask = torch.cat([case.inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)

    def go_on(cache):
        return case.board.model(input_ids=more, attention_mask=mask, past_key_values=cache).logits

    def fill():
        return case.board.model(**case.prompt, use_cache=True).past_key_values

    with case.board.decide(case.skip):
        expected = go_on(fill())
    with case.in_stages(["every_layer"]):
        cache = fill()
    with case.board.decide(case.skip):
        assert torch.equal(go_on(cache), expected)
    if rate:
        with case.in_stages(["every_layer"]):
            cache = fill()
        for other in (~case.skip, 0 * case.skip):
            with case.board.decide(other), pytest.raises(ValueError, match="filled under a decision"):
                go_on(cache)


@torch.inference_mode()
def test_what_is_seen_is_what_enters_the_layer(name):
    """Without what is dropped; of a decoder after an encoder, what ``generate()`` has already."""
    case = Case(name, seed=1, drop=True, side="left" if name in DECODER else "right")
    entered = {}

    def record(module, args, kwargs):
        entered.setdefault(module, args[0] if args else kwargs["hidden_states"])

    first = first_layer_input(case.board, case.prompt)
    layers = {(switch.stack, switch.index): switch.layer for switch in case.board.switches}
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers.values()]
    with case.in_stages(["every_layer"]):
        case.model()
    for hook in hooks:
        hook.remove()
    kept = torch.from_numpy(case.keep) & case.inputs["attention_mask"].bool()
    for seen in case.seen:
        stack, _, index = seen.stage.partition(".")
        if seen.stage == "first":
            assert torch.equal(seen.hidden, first)
            assert torch.equal(seen.mask, case.inputs["attention_mask"])
            continue
        if index:
            assert torch.equal(seen.hidden, entered[layers[stack, int(index)]])
        if stack == "decoder" and name in ENCODER_DECODER:
            assert seen.encoded.shape == (4, case.keep.sum(axis=1).max(), 16)
        if stack == "decoder" and name in ENCODER_DECODER and index:
            assert seen.mask.tolist() == [[1, 0, 0, 0]] * 4
        else:
            assert torch.equal(seen.mask.sum(dim=1), kept.sum(dim=1))


@pytest.mark.parametrize("name", DECODER)
@torch.inference_mode()
def test_an_answer_after_the_prompt_is_not_looked_at(name):
    case = Case(name, side="left")
    case.inputs["attention_mask"] = case.inputs["attention_mask"][:, :5]
    seen = []
    with case.board.decide_in_pass(
        lambda shown: (seen.append(shown), (np.zeros((4, 2)), None))[1], ["every_layer"], case.inputs["attention_mask"]
    ):
        case.board.model(input_ids=case.inputs["input_ids"])
    assert [shown.mask[:, :5].tolist() for shown in seen] == 3 * [case.inputs["attention_mask"].tolist()]
    assert not any(shown.mask[:, 5:].any() for shown in seen)


@torch.inference_mode()
def test_what_all_rows_skip_is_never_called_and_flops_are_counted(name):
    case, called = Case(name, attention="eager"), set()
    case.skip[:, [0, -1]] = True
    for switch in case.board.switches:
        inside = [part for module in switch.modules for part in module.modules() if part is not module]
        for part in inside:  # a switched module itself is called, and calls nothing inside
            if isinstance(part, nn.Linear | Conv1D):
                part.register_forward_pre_hook(lambda *_, switch=switch: called.add(switch.name))
    with case.in_stages(["every_layer"]), FlopCounterMode(display=False) as counter:
        case.model()
    ran = {switch.name for switch, skips in zip(case.board.switches, case.skip.T, strict=True) if not skips.all()}
    assert called - ran == set()
    assert ran
    target = np.full(4, 4) if name in ENCODER_DECODER else None
    always, switched = FlopsModel(case.board).costs(np.full(4, 7), target)
    assert counter.get_total_flops() == (always + (switched * ~case.skip).sum(axis=1)).sum()


def test_nothing_waits_for_the_device_but_what_chooses(name):
    case = Case(name, drop=True, side="left" if name in DECODER else "right")
    runs = [case.model]
    if name in GENERATING:
        length = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
        runs.append(lambda: case.board.model.generate(**case.prompt, **length))
    for run in runs:
        with torch.no_grad(), Synchronisations() as untouched:
            run()
        with torch.no_grad(), case.in_stages(["every_layer"]), Synchronisations() as decided:
            run()
        assert decided.count <= untouched.count


@pytest.mark.parametrize("name", ["bert", "mbart", "llama"])
@torch.inference_mode()
def test_threads_decide_each_in_their_own_stages(name):
    cases = [Case(name, seed, drop=seed == 1) for seed in range(3)]
    board, expected = cases[0].board, []
    for case in cases:
        case.board = board
        with board.decide(case.skip, case.keep):
            expected.append(case.model())

    @torch.inference_mode()
    def run(case, right):
        for _ in range(15):
            with case.in_stages(["every_layer"]):
                assert torch.equal(case.model(), right)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, cases, expected))
    assert not board._scope.family.needs


def test_gradients_of_a_staged_pass_are_those_of_the_same_decisions(name):
    case = Case(name)
    gradients = []
    for block in (case.board.decide(case.skip), case.in_stages(["every_layer"])):
        case.board.model.zero_grad()
        with block:
            case.model().square().sum().backward()
        gradients.append({path: p.grad for path, p in case.board.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][path], gradients[1][path]) for path in gradients[0])


def test_wrong_choices_are_named():
    case = Case("bert")

    def run(*choices, mask=None):
        left = list(choices)
        with case.board.decide_in_pass(lambda seen: left.pop(0), ["first", "encoder.1"], mask):
            case.model()

    two = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"skip must have shape \[batch, 2\]"):
        run((np.zeros((4, 6)), None))
    with pytest.raises(ValueError, match="dropped only before the first layer; at"):
        run((two, None), (np.zeros((4, 4)), np.ones((4, 7))))
    with pytest.raises(ValueError, match="decides on 3 rows, but earlier stages decided on 4"):
        run((two, None), (np.zeros((3, 4)), None))
    with pytest.raises(ValueError, match=r"the mask must have a column.*\[4, 7\].*got \[4, 9\]"):
        run((two, None), mask=torch.ones(4, 9))
    run((two[:1], None), (np.zeros((4, 4)), None), mask=torch.ones(4, 7))  # a single row stands for all
    run((two, None), (np.zeros((1, 4)), None))


# --- passes that are stopped and resumed ------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(list(TINY)),
    seed=st.integers(0, 10_000),
    drop=st.booleans(),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
)
@torch.inference_mode()
def test_a_pass_that_is_stopped_and_resumed_is_the_whole_pass(name, seed, drop, rate):
    case = Case(name, seed, drop, rate, side="left" if name in DECODER else "right")
    with case.board.decide(case.skip, case.keep):
        expected = case.model()
    seen, guess = None, case.skip.copy()
    for stage, columns in case.board.decided_at(some_stages(case.board, seed)).items():
        guess[:, columns.start :] = np.random.default_rng(seed).random(guess[:, columns.start :].shape) < 0.5
        keep = case.keep if stage != "first" else None  # what is not decided yet does not count
        seen = case.board.run_to(stage, case.model, guess, keep, mask=case.inputs["attention_mask"], resume_from=seen)
        assert seen.stage == stage
        guess[:, columns] = case.skip[:, columns]
    for _ in range(2):  # it may be resumed again, and elsewhere be decided otherwise meanwhile
        with case.board.decide(case.skip, case.keep, resume_from=seen):
            assert torch.equal(case.model(), expected)
        with case.board.decide(~case.skip, case.keep, resume_from=seen):
            case.model()
    assert not case.board._scope.family.needs


@torch.inference_mode()
def test_nothing_runs_twice_in_a_pass_that_is_stopped(name):
    """All products of the parts together are those of the whole pass; embeddings are looked up again."""
    case = Case(name, attention="eager")
    with FlopCounterMode(display=False) as whole, case.board.decide(case.skip):
        case.model()
    seen = None
    with FlopCounterMode(display=False) as parts:
        for stage in case.board.stages:
            seen = case.board.run_to(stage, case.model, case.skip, resume_from=seen)
        with case.board.decide(case.skip, resume_from=seen):
            case.model()
    projected = 2 * 4 * 7 * 12 * 16 * len(case.board.stages) if name == "electra" else 0  # of its embeddings
    assert parts.get_total_flops() == whole.get_total_flops() + projected


@torch.inference_mode()
def test_rows_of_a_stopped_pass_are_resumed_alone(name):
    case = Case(name, seed=2, drop=True)
    case.keep[0] = True  # so that the rows alone are as long
    late = LATE[name]
    with case.board.decide(case.skip, case.keep):
        expected = case.model()
    seen = case.board.run_to(late, case.model, case.skip, case.keep)
    picked = torch.tensor([3, 0])
    inputs = {key: value[picked] if isinstance(value, torch.Tensor) else value for key, value in case.inputs.items()}
    with case.board.decide(case.skip[picked], case.keep[picked], resume_from=seen.rows(picked)):
        logits = case.board.model(**inputs).logits
    counted = torch.from_numpy(case.keep[picked]) & inputs["attention_mask"].bool() if name in DECODER else slice(None)
    torch.testing.assert_close(logits[counted], expected[picked][counted], rtol=1e-4, atol=1e-5)
    with (
        case.board.decide(case.skip, case.keep, resume_from=seen.rows(picked)),
        pytest.raises(ValueError, match="stopped"),
    ):
        case.model()


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_generating_goes_on_after_an_encoder_that_has_run(name):
    case = Case(name, drop=True)
    with case.board.decide(case.skip, case.keep):
        expected = case.board.model.generate(**case.prompt, max_new_tokens=6, num_beams=2, do_sample=False)
    with torch.no_grad():
        seen = case.board.run_to("decoder", functools.partial(case.board.model, **case.prompt), case.skip, case.keep)
    for switch in case.board.switches:
        if switch.reads_input:
            switch.layer.register_forward_hook(lambda *_: pytest.fail("the encoder runs again"))
    with case.board.decide(case.skip, case.keep, resume_from=seen):
        tokens = case.board.model.generate(**case.prompt, max_new_tokens=6, num_beams=2, do_sample=False)
    assert torch.equal(tokens, expected)


# --- texts that are generated again on what the prompt has run -------------------------------------------------------


def state_in_generate(case, stage, rows, **arguments):
    """The state of some rows at a stage of a ``generate()`` that decides layer by layer, and goes on after it."""
    columns, kept = case.board.decided_at(["every_layer"]), []

    def choose(seen):
        if seen.stage == stage:
            kept.append(seen.rows(torch.tensor(rows)))
        return case.skip[:, columns[seen.stage]], None

    with case.board.decide_in_pass(choose, ["every_layer"], case.inputs["attention_mask"]):
        case.board.model.generate(**case.prompt, **arguments)
    return kept[0]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(DECODER),
    seed=st.integers(0, 10_000),
    layer=st.sampled_from([1, 2]),
    arguments=st.sampled_from([{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}]),
)
def test_a_text_is_generated_densely_on_what_its_prompt_has_run(name, seed, layer, arguments):
    case, rows = Case(name, seed, side="left"), [3, 1]
    case.skip[rows, : 2 * layer] = False
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **arguments}
    seen = state_in_generate(case, f"decoder.{layer}", rows, **arguments)
    prompts = {key: value[rows] for key, value in case.prompt.items()}

    def generate(**given):
        return case.board.model.generate(**given, **arguments, return_dict_in_generate=True, output_logits=True)

    dense = generate(**prompts)
    with case.board.decide(np.zeros((1, len(case.board))), resume_from=seen):
        again, *more = (generate(**prompts) for _ in range(2))
    for output in (again, *more):
        assert torch.equal(output.sequences, dense.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(dense.logits), rtol=1e-4, atol=1e-4)
    for row, text in zip(rows, again.sequences, strict=True):
        assert torch.equal(text, generate(**row_of(case.prompt, row)).sequences[0])
    assert not case.board._scope.family.needs


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "mistral"])
def test_layers_that_have_run_on_a_prompt_run_on_generated_tokens_alone(name, beams):
    case, ran = Case(name, side="left"), []
    case.skip[0, :2] = False
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    seen = state_in_generate(case, "decoder.1", [0], **arguments)
    for switch in case.board.switches[::2]:
        switch.modules[0].register_forward_pre_hook(
            lambda _, args, number=switch.index: ran.append((number, *args[0].shape[:2]))
        )
    with case.board.decide(np.zeros((1, len(case.board))), resume_from=seen):
        case.board.model.generate(**row_of(case.prompt, 0), **arguments)
    assert ran == [(1, beams, 7), (2, beams, 7), *[(layer, beams, 1) for layer in range(3)] * 3]


def test_what_generate_cannot_resume_is_refused():
    case, length = Case("llama", side="left"), {"max_new_tokens": 3}
    case.skip[:] = False
    case.skip[0] = case.skip[1, 2:] = True
    with pytest.raises(ValueError, match="an input that skipped an attention are missing; resume inputs"):
        state_in_generate(case, "decoder.1", [1, 0], **length)
    seen = state_in_generate(case, "decoder.1", [1, 1], **length)
    prompt, dense = {key: value[[1, 1]] for key, value in case.prompt.items()}, np.zeros((2, len(case.board)))
    for skip, keep in ((case.skip[[1, 1]], None), (dense, np.arange(14).reshape(2, 7) > 0)):
        with (
            case.board.decide(skip, keep, resume_from=seen),
            pytest.raises(ValueError, match=r"resumes at 'decoder.1' only densely"),
        ):
            case.board.model.generate(**prompt, **length)
    later = case.board.run_to("decoder.2", lambda: case.board.model.generate(**prompt, **length), resume_from=seen)
    assert later.keys is None  # the first layer has not run
    with torch.no_grad():
        plain = case.board.run_to("decoder.1", functools.partial(case.board.model, **prompt))
    with case.board.decide(dense, resume_from=plain), pytest.raises(ValueError, match="has no keys of earlier layers"):
        case.board.model.generate(**prompt, **length)
    case = Case("mbart")
    with torch.no_grad():
        plain = case.board.run_to("decoder.1", lambda: case.board.model.generate(**case.prompt, **length))
    dense = np.zeros((1, len(case.board)))
    with case.board.decide(dense, resume_from=plain), pytest.raises(ValueError, match="has no keys of earlier layers"):
        case.board.model.generate(**case.prompt, **length)


def test_a_pass_that_does_not_reach_its_stage_says_so():
    case = Case("mbart")
    with pytest.raises(RuntimeError, match="without reaching the stage 'decoder'"):
        case.board.run_to("decoder", lambda: case.board.model.get_encoder()(**case.prompt))
