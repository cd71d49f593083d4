"""A clock that is simulated, an engine that only counts, and a service on it."""

import asyncio
import heapq
import selectors
from contextlib import contextmanager
from threading import Event
from time import sleep

import numpy as np
import pytest
from starlette.testclient import TestClient

from sd_gym.inference.answer import Answer, TextModel
from sd_gym.operating_points import OperatingPoint
from sd_gym.serving.app import Service
from sd_gym.serving.engine import Described, Served
from sd_gym.serving.grouping import PassCost, Row
from sd_gym.serving.limits import Limits, RequestLimits


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Sleeping takes no time: the clock jumps to the next thing that is due."""

    def __init__(self):
        super().__init__(selectors.SelectSelector())
        self.now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            while self._scheduled and self._scheduled[0]._cancelled:
                handle = heapq.heappop(self._scheduled)
                handle._scheduled = False
                self._timer_cancelled_count -= 1
            if self._scheduled:
                self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


def simulate(main):
    """Run a coroutine on a simulated clock."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(main)


class CountingEngine:
    """Inputs are (name, mask, length); a group takes one second, and a tenth for each row."""

    def __init__(self, broken=(), seconds=1.0):
        self.broken, self.seconds, self.groups, self.decided, self.running = set(broken), seconds, [], [], 0

    async def prepare(self, inputs):
        await self._work(0.01)
        if any(("prepare", name) in self.broken for name, *_ in inputs):
            raise ValueError("not decided")
        self.decided += [name for name, *_ in inputs]
        return [Row(length, (mask, mask % 2), None, name) for name, mask, length in inputs]

    async def run(self, rows, point):
        await self._work(self.seconds + len(rows) / 10)
        if any(("run", row.content) in self.broken for row in rows):
            raise RuntimeError("does not run")
        self.groups.append((rows, point))
        return [f"answer to {row.content} at {point}" for row in rows]

    async def _work(self, seconds):
        assert not self.running, "asked for two things at a time"
        self.running += 1
        await asyncio.sleep(seconds)
        self.running -= 1


class StubPoints:
    """Two operating points, the bold one the usual."""

    points, default = (OperatingPoint(0.0, 0.0, 0.01, 0.4, True), OperatingPoint(5.0, 0.0, 0.0, 1.0, True)), 0

    def index(self, max_loss, max_flops):
        if max_loss is None and max_flops is None:
            return None
        if max_flops is not None and max_flops < 0.4:
            raise ValueError("no operating point does that")
        return int(max_loss is not None and max_loss < 0.01)


class StubEngine(TextModel):
    """Answers a text with itself in capitals; "wait" waits for ``going`` to be set, "break" breaks."""

    groups_masks, fields, optional = True, ("text",), False
    served = Described("stub", ("text",), "text", ["decoder.0.attention", "decoder.0.feed_forward"], 8, completes=True)

    def __init__(self):
        self.going, self.started, self.warm = Event(), Event(), Event()
        self.warm.set()
        self.ran = []

    def prepare(self, inputs):
        return [Row(len(asked.texts[0].split()), [asked.point] * 2, None, asked) for asked in inputs]

    def run(self, rows, point):
        texts = [row.content.texts[0] for row in rows]
        self.ran += texts
        self.started.set()
        if "wait" in texts:
            self.going.wait(10)
        if "break" in texts:
            raise ValueError("it broke")
        shares = [0.4 if row.content.point in (None, 0) else 1.0 for row in rows]
        answers = [
            Answer(" ".join(text.upper().split()[: row.content.longest]), np.array([1, 0]), 0, share, 0)
            for text, row, share in zip(texts, rows, shares, strict=True)
        ]
        counts = [len(one.answer.split()) for one in answers]
        ends = [count < (row.content.longest or 8) for count, row in zip(counts, rows, strict=True)]
        costs = [(3, 100 * one.flops_ratio, 50.0, 100.0) for one in answers]
        return [Served(one, None, *cost, *more) for one, cost, *more in zip(answers, costs, counts, ends, strict=True)]

    def _answers(self, texts, dense, batch_size):
        raise NotImplementedError("a service asks for rows, never for the answers to all texts")

    def warm_up(self):
        self.warm.wait(10)
        return PassCost(8.0)


@contextmanager
def client_of(service, *, warm=True):
    """A client of a service that runs."""
    with TestClient(service.app(), raise_server_exceptions=False) as client:
        while warm and client.get("/readyz").status_code != 200:
            sleep(0.01)
        yield client


@pytest.fixture(autouse=True)
def quick_warm_up(monkeypatch):
    """A warm-up that measures few passes of few rows."""
    monkeypatch.setattr("sd_gym.serving.engine.WARM_UP_ROUNDS", 1)
    monkeypatch.setattr("sd_gym.serving.engine.WARM_UP_ROWS", (1, 2))


@pytest.fixture
def stub():
    """The engine of a service, and a function that makes a client of it under limits and settings."""
    engine = StubEngine()

    def client(warm=True, **changes):
        limits = Limits(**{key: changes.pop(key) for key in list(changes) if key in Limits.__dataclass_fields__})
        service = Service(engine, StubPoints(), limits, RequestLimits(**changes))
        return client_of(service, warm=warm)

    yield engine, client
    engine.going.set()
