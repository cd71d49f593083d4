"""Where decisions count: in the thread, the task and the generator that they were put in force in."""

import asyncio
import contextlib
import contextvars
import copy
import functools
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sd_gym.switch import StaleBoardError, Switchboard, attention_received, first_layer_input
from tests.conftest import DECODER, TINY, make_inputs, make_model
from tests.switch.conftest import logits, mixed, quantised


@pytest.fixture
def switching_often():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Job:
    """A batch, its decisions, and the output that it must have."""

    def __init__(self, name, board, seed, drop=False):
        random = np.random.default_rng(seed)
        batch = 2 + seed % 3
        self.board = board
        self.inputs = make_inputs(name, batch=batch, seed=seed, side="left" if name in DECODER else "right")
        self.skip = random.random((batch, len(board))) < 0.5
        self.keep = None
        if drop:
            self.keep = random.random((batch, 7)) < 0.7
            self.keep[:, [0, -1]] = True
        self.expected = self.run()

    def decide(self):
        return self.board.decide(self.skip, self.keep)

    @torch.inference_mode()
    def model(self):
        return self.board.model(**self.inputs).logits

    def run(self):
        with self.decide():
            return self.model()

    def is_right(self):
        return torch.equal(self.run(), self.expected)

    def model_is_right(self):
        """Inside its block."""
        return torch.equal(self.model(), self.expected)

    def runs_densely(self):
        dense = self.board.decide(np.zeros_like(self.skip))
        with dense:
            expected = self.model()
        return torch.equal(self.model(), expected) and not torch.equal(expected, self.expected)


def in_threads(*functions):
    """Run functions at the same time; what they raise is raised."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(function) for function in functions]]


@pytest.mark.usefixtures("switching_often")
def test_threads_with_one_model_have_each_their_own_decisions(kind):
    board = Switchboard(make_model(kind))
    jobs = [Job(kind, board, seed, drop=seed % 2 == 1) for seed in range(4)]
    dense = board.model(**jobs[0].inputs).logits

    def work(job):
        return all(job.is_right() for _ in range(60))

    def work_densely():
        return all(torch.equal(board.model(**jobs[0].inputs).logits, dense) for _ in range(60))

    assert all(in_threads(work_densely, *(lambda job=job: work(job) for job in jobs)))


def test_a_decision_may_begin_in_the_middle_of_another_threads_sublayer():
    board = Switchboard(make_model("llama"))
    inputs = make_inputs("llama", batch=2, side="left")
    skip = np.zeros((2, len(board)), dtype=int)
    skip[0, -1] = 1  # the first sublayer, where the other begins, needs no switch
    with torch.inference_mode(), board.decide(skip):
        expected = board.model(**inputs).logits
    begun, done = threading.Event(), threading.Event()

    def other():
        with board.decide(1 - skip):
            begun.set()
            done.wait(10)

    def begin(*_):
        pool.submit(other)
        begun.wait(10)

    with ThreadPoolExecutor(1) as pool:
        hook = board.switches[0].modules[0].register_forward_hook(begin)
        with torch.inference_mode(), board.decide(skip):
            assert torch.equal(board.model(**inputs).logits, expected)
        hook.remove()
        assert begun.is_set()
        done.set()


@pytest.mark.parametrize("name", ["mbart", "llama"])
@pytest.mark.usefixtures("switching_often")
def test_threads_generate_each_under_their_own_decisions(name):
    board = Switchboard(make_model(name))
    jobs = [Job(name, board, seed, drop=seed == 2) for seed in range(3)]

    def generate(job):
        prompt = {key: job.inputs[key] for key in ("input_ids", "attention_mask")}
        with job.decide():
            return board.model.generate(**prompt, max_new_tokens=4, num_beams=2, do_sample=False)

    expected = [generate(job) for job in jobs]
    together = in_threads(*(lambda job=job: [generate(job) for _ in range(8)] for job in jobs))
    for tokens, right in zip(together, expected, strict=True):
        assert all(torch.equal(one, right) for one in tokens)


@pytest.mark.usefixtures("switching_often")
def test_one_thread_observes_while_others_request(kind):
    board = Switchboard(make_model(kind))
    job = Job(kind, board, 1)
    with torch.inference_mode():
        dense = board.model(**job.inputs).logits
        looks = [look(board, job.inputs) for look in (first_layer_input, attention_received)]

    def observe():
        for _ in range(40):
            assert torch.equal(first_layer_input(board, job.inputs), looks[0])
            assert torch.equal(attention_received(board, job.inputs), looks[1])

    def request():
        with torch.inference_mode():
            assert all(torch.equal(board.model(**job.inputs).logits, dense) for _ in range(80))

    def decide():
        assert all(job.is_right() for _ in range(80))

    in_threads(observe, request, decide)


def test_looking_inside_a_block_shows_what_it_shows_outside(kind):
    board = Switchboard(make_model(kind))
    job = Job(kind, board, 1, drop=True)
    other = make_inputs(kind, batch=6)  # not the rows that are decided on
    for look in (first_layer_input, attention_received):
        outside = look(board, other)
        with job.decide():
            assert torch.equal(look(board, other), outside)
            assert job.model_is_right()


def test_asyncio_tasks_have_each_their_own_decisions(kind):
    board = Switchboard(make_model(kind))
    jobs = [Job(kind, board, seed) for seed in range(3)]

    async def work(job):
        with job.decide():
            for _ in range(3):
                assert job.model_is_right()
                await asyncio.sleep(0)
        return True

    async def work_densely():
        for _ in range(3):
            assert jobs[0].runs_densely()
            await asyncio.sleep(0)
        return True

    async def main():
        return await asyncio.gather(work_densely(), *(work(job) for job in jobs))

    assert all(asyncio.run(main()))
    assert jobs[0].runs_densely()


def test_a_task_that_was_made_in_a_block_keeps_its_decision():
    board = Switchboard(make_model("bert"))
    job = Job("bert", board, 0)

    async def work():
        await asyncio.sleep(0)
        return job.model_is_right()

    async def main():
        with job.decide():
            task = asyncio.create_task(work())
        assert job.runs_densely()
        return await task

    assert asyncio.run(main())


def stream(job, times=3):
    with job.decide():
        for _ in range(times):
            yield job.model_is_right()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_interleaved_generators_run_each_under_their_own_decisions(kind, order):
    board = Switchboard(make_model(kind))
    jobs = [Job(kind, board, seed, drop=seed == 1) for seed in range(2)]
    streams = [stream(job) for job in jobs]
    for _ in range(3):
        assert next(streams[0])
        assert jobs[0].runs_densely()  # the caller's code is in no block
        assert next(streams[1])
    with jobs[1].decide():
        assert jobs[1].model_is_right()
    for number in order:  # ends in the order that it began in, or in the other one
        streams[number].close()
        assert jobs[0].runs_densely()
    assert not board._scope.family.needs


def test_a_generator_may_run_and_end_in_other_contexts():
    """As web servers do it: each step of a stream in another thread, with a new copy of the request's context."""
    board = Switchboard(make_model("bert"))
    job = Job("bert", board, 0)
    steps = stream(job)
    for _ in range(3):
        assert in_threads(functools.partial(contextvars.copy_context().run, next, steps)) == [True]
        assert job.runs_densely()
    in_threads(steps.close)
    assert job.runs_densely()
    steps = stream(job)
    next(steps)
    del steps  # ended by the garbage collector
    gc.collect()
    assert job.runs_densely()
    assert not board._scope.family.needs


def test_blocks_inside_and_around_generators_nest():
    board = Switchboard(make_model("bert"))
    first, second, third = (Job("bert", board, seed) for seed in (0, 3, 6))

    def inner():
        with second.decide():
            yield second.model_is_right()
            with third.decide():
                yield third.model_is_right()
            yield second.model_is_right() and third.is_right() and second.model_is_right()

    steps = inner()
    with first.decide():
        for right in steps:
            assert right
            assert first.model_is_right()
    assert first.runs_densely()


async def async_stream(job, in_task=False):
    async def same():
        return job.model_is_right()

    with job.decide():
        for _ in range(2):
            await asyncio.sleep(0)
            yield (await asyncio.create_task(same())) if in_task else await same()


def test_an_async_generator_has_its_own_decision():
    board = Switchboard(make_model("bert"))
    jobs = [Job("bert", board, seed) for seed in range(2)]

    async def main():
        one, other = (async_stream(job) for job in jobs)
        for _ in range(2):
            assert await anext(one)
            assert jobs[0].runs_densely()
            assert await anext(other)
        await one.aclose()
        assert await anext(other, True)
        assert [right async for right in async_stream(jobs[0], in_task=True)] == [True, True]

    asyncio.run(main())
    assert jobs[0].runs_densely()
    assert not board._scope.family.needs


def test_a_context_of_two_open_generators_is_refused():
    """Whose block counts in a task that one of them makes cannot be told."""
    board = Switchboard(make_model("bert"))
    jobs = [Job("bert", board, seed) for seed in range(2)]

    async def main():
        one, other = async_stream(jobs[0], in_task=True), async_stream(jobs[1])
        assert await anext(one)
        assert await anext(other)
        with pytest.raises(RuntimeError, match="blocks of several generators"):
            await anext(one)
        await other.aclose()

    asyncio.run(main())
    assert jobs[0].runs_densely()


@contextlib.contextmanager
def deciding(job):
    with job.decide():
        yield


def test_a_context_manager_made_of_a_generator_is_an_ordinary_block():
    board = Switchboard(make_model("bert"))
    first, second = Job("bert", board, 0), Job("bert", board, 3)

    def steps():
        with deciding(second):
            yield second.model_is_right()

    with deciding(first):
        assert first.model_is_right()
        running = steps()
        assert next(running)
        assert first.model_is_right()
        with contextlib.ExitStack() as stack:
            stack.enter_context(deciding(second))
            assert second.model_is_right()
        assert first.model_is_right()
        assert next(running, None) is None
    assert first.runs_densely()


def test_blocks_that_end_in_another_order_leave_the_model_dense(kind):
    board = Switchboard(make_model(kind))
    first, second = Job(kind, board, 0), Job(kind, board, 3)
    one, other = first.decide(), second.decide()
    one.__enter__()
    other.__enter__()
    assert second.model_is_right()
    one.__exit__(None, None, None)
    assert second.model_is_right()
    other.__exit__(None, None, None)
    assert first.runs_densely()
    assert not board._scope.family.needs


def test_a_block_may_end_in_another_thread_than_it_began_in():
    board = Switchboard(make_model("bert"))
    job = Job("bert", board, 0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(job.decide())
        in_threads(stack.pop_all().close)
        assert job.runs_densely()


def test_decisions_end_with_an_error(kind):
    board = Switchboard(make_model(kind))
    job = Job(kind, board, 0)
    with pytest.raises(RuntimeError, match="on purpose"), job.decide():
        raise RuntimeError("on purpose")
    hook = board.switches[1].modules[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.run()
    hook.remove()
    assert job.runs_densely()
    assert job.is_right()


# --- decisions that are made in the pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", list(TINY))
@torch.inference_mode()
def test_deciding_in_the_pass_is_deciding_before_it(name, drop):
    board = Switchboard(make_model(name))
    job, seen = Job(name, board, seed=3, drop=drop), []

    def choose(shown):
        seen.append(shown.hidden)
        return job.skip, job.keep

    with board.decide_in_pass(choose):
        assert torch.equal(job.model(), job.expected)
        with board.decide(0 * job.skip):
            dense = job.model()
        assert torch.equal(job.model(), job.expected)  # holds to the end of the block
    assert len(seen) == 1
    given = ("input_ids", "attention_mask", "decoder_input_ids")
    inputs = {key: value for key, value in job.inputs.items() if key in given}
    assert torch.equal(seen[0], first_layer_input(board, inputs))
    assert torch.equal(job.model(), dense)
    with board.decide_in_pass(lambda seen: (0 * job.skip, None)):
        assert torch.equal(job.model(), dense)
    with board.decide_in_pass(choose):
        pass  # no pass, no decision
    assert not board._scope.family.needs
    assert not any("forward" in vars(module) for module in board.model.modules())


def test_threads_decide_each_in_their_own_pass(kind, switching_often):
    board = Switchboard(make_model(kind))
    jobs = [Job(kind, board, seed) for seed in range(4)]

    def run(job):
        right = 0
        for _ in range(15):
            with board.decide_in_pass(lambda seen: (job.skip, job.keep)):
                right += job.model_is_right()
        return right

    assert in_threads(*(functools.partial(run, job) for job in jobs)) == [15] * 4
    assert not board._scope.family.needs


def test_what_cannot_decide_in_the_pass_is_refused():
    board = Switchboard(make_model("mbart"))
    job = Job("mbart", board, seed=0)
    encoded = board.model.get_encoder()(job.inputs["input_ids"])

    def block():
        return board.decide_in_pass(lambda seen: (job.skip, None))

    with block(), pytest.raises(ValueError, match="in the encoder, which this pass does not run"):
        board.model(encoder_outputs=encoded, decoder_input_ids=job.inputs["decoder_input_ids"])
    compiled = torch.compile(board.model, backend="eager", fullgraph=True)
    with block(), pytest.raises(Exception, match="cannot decide in the pass"):
        compiled(**job.inputs)
    ids = job.inputs.pop("input_ids")
    embedded = board.model.get_input_embeddings()(ids).detach().requires_grad_()
    with block(), pytest.raises(NotImplementedError, match="runs layers again in the backward pass"):
        checkpoint(lambda x: board.model(inputs_embeds=x, **job.inputs).logits, embedded, use_reentrant=False)
    with pytest.raises(ValueError, match="skip must hold only 0"), board.decide_in_pass(lambda _: (2 + job.skip, None)):
        board.model(input_ids=ids, **job.inputs)
    board.remove()
    with pytest.raises(StaleBoardError, match="removed"):
        block()


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
