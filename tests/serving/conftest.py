"""A clock that is simulated, an engine that only counts, and a service on it."""

import asyncio
import heapq
import selectors

import pytest

from sd_gym.serving.batcher import Row


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
        return [Row(length, (mask, mask % 2), name) for name, mask, length in inputs]

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
