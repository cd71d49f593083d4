"""``generate()`` in a thread of its own, read by a streamer."""

import contextlib
import contextvars
import threading
import warnings

import numpy as np
import pytest
import torch
from transformers import TextIteratorStreamer

from sd_gym.switch import Switchboard
from tests.conftest import make_model


class Words:
    """A tokenizer that a streamer can use."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids)) + " "


@pytest.fixture
def streaming():
    """A board, a decision, how a thread is started on ``generate()``, and the texts with and without the decision."""
    board = Switchboard(make_model("llama"))
    prompt = {"input_ids": torch.randint(4, 40, (1, 5), generator=torch.Generator().manual_seed(0))}
    skip = np.arange(len(board))[None] % 2

    def start(**settings):
        streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=20)
        arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "streamer": streamer}
        return streamer, {**prompt, **arguments, **settings}

    def text(*skip):
        streamer, arguments = start()
        with board.decide(*skip) if skip else contextlib.nullcontext():
            board.model.generate(**arguments)
        return "".join(streamer)

    decided, dense = text(skip), text()
    assert decided != dense
    return board, skip, start, decided, dense


def test_a_streamer_read_after_the_block_has_the_text_of_its_decision(streaming):
    board, skip, start, decided, _ = streaming
    streamer, arguments = start()
    with board.decide(skip):
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(board.model.generate,), kwargs=arguments)
    thread.start()
    with board.decide(1 - skip):
        board.model.generate(**{**arguments, "streamer": None})
    assert "".join(streamer) == decided
    thread.join()


def test_a_generator_streams_from_a_thread_that_it_gave_its_context(streaming):
    board, skip, start, decided, _ = streaming

    def answer():
        streamer, arguments = start()
        with board.decide(skip):
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(board.model.generate,), kwargs=arguments).start()
            yield from streamer

    def answer_after_the_block():
        streamer, arguments = start()
        with board.decide(skip):
            run = contextvars.copy_context().run
            thread = threading.Thread(target=run, args=(board.model.generate,), kwargs=arguments)
        thread.start()
        yield from streamer

    assert "".join(answer()) == decided
    assert "".join(answer_after_the_block()) == decided


def test_a_thread_without_the_context_generates_densely_and_says_so(streaming):
    board, skip, start, _, dense = streaming
    streamer, arguments = start()

    def in_thread():
        thread = threading.Thread(target=board.model.generate, kwargs=arguments)
        thread.start()
        thread.join()

    with board.decide(skip), pytest.warns(UserWarning, match=r"generates densely.*copy_context\(\)\.run"):
        in_thread()
    assert "".join(streamer) == dense


def test_a_thread_that_decided_densely_itself_is_not_warned(streaming):
    board, skip, start, _, dense = streaming
    streamer, arguments = start()

    def generate_densely():
        with board.decide(0 * skip):
            board.model.generate(**arguments)

    with board.decide(skip), warnings.catch_warnings():
        warnings.simplefilter("error")
        thread = threading.Thread(target=generate_densely)
        thread.start()
        assert "".join(streamer) == dense
        thread.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_does_not_wait_for_a_thread_that_failed(streaming):
    board, skip, start, _, _ = streaming
    streamer, arguments = start()
    with board.decide(np.repeat(skip, 3, axis=0)):  # for three rows, but there is one
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(board.model.generate,), kwargs=arguments)
        thread.start()
        assert "".join(streamer) == ""
    thread.join()
