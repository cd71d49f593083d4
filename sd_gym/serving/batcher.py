"""Answers requests in groups: requests are decided before they queue, and those that share a mask run together.

The batcher does not depend on HTTP or torch. Its clock is the event loop's.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sd_gym.serving.dial import ServerDial
from sd_gym.serving.grouping import Paces, PassCost, Row, best_group
from sd_gym.serving.limits import Limits


class QueueFullError(Exception):
    """The queue has no room; after ``retry_after`` seconds there may be some."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The batcher takes no more requests."""


class LateError(Exception):
    """The deadline has passed, or cannot be met any more."""


class Group(NamedTuple):
    """Rows that ran together."""

    rows: list[Row]
    answers: list[Any]
    waits: list[float]  # seconds of each row from its arrival to its start
    seconds: float  # seconds of running
    point: int  # the operating point


@dataclass(eq=False)
class _Entry:
    given: Any
    arrived: float
    deadline: float
    answer: asyncio.Future[Any]
    of_request: list[asyncio.Future[Any]]  # the answers of all inputs of its request
    is_queued: bool = True  # it is not running yet
    row: Row = field(init=False)  # set when it is decided

    @property
    def waits(self) -> bool:
        return not self.answer.done()

    def finish(self, answer: Any) -> None:
        if self.waits and isinstance(answer, Exception):
            self.answer.set_exception(answer)
            for other in self.of_request:  # the next group may be taken before the request does this itself
                other.cancel()
        elif self.waits:
            self.answer.set_result(answer)


class Batcher:
    """Queues inputs and answers them in groups while ``work`` runs.

    ``prepare`` decides on inputs, and ``run`` answers rows of one kind at an operating point: one call at a time. If
    one fails, it is repeated for each input alone.
    The overhead of a pass, ``cost``, decides how rows are grouped. ``on_group`` is called with each group after it ran.
    """

    def __init__(
        self,
        prepare: Callable[[list[Any]], Awaitable[list[Row]]],
        run: Callable[[list[Row], int], Awaitable[list[Any]]],
        limits: Limits,
        cost: PassCost,
        dial: ServerDial = ServerDial(),  # noqa: B008  (it never changes)
        on_group: Callable[[Group], None] = lambda group: None,
    ) -> None:
        self._prepare, self._answer = prepare, run
        self._limits = limits
        self._cost = cost
        self._dial = dial
        self._on_group = on_group
        self.queued = 0  # number of waiting rows
        self._new: list[_Entry] = []  # not decided yet
        self._queue: list[_Entry] = []  # by deadline
        self._wake = asyncio.Event()
        self._closed = False
        self._arrivals: deque[float] = deque()  # when the rows of the last ``dial.window`` seconds arrived
        self._paces = Paces(cost)

    def close(self) -> None:
        """Take no more requests; ``work`` ends when all accepted requests are answered."""
        self._closed = True
        self._wake.set()

    async def answer(self, inputs: Sequence[Any], timeout: float) -> list[Any]:
        """The answers to the inputs of one request, in order. Cancel it to take the inputs out of the queue.

        Raises:
            QueueFullError: If the queue has no room for all of them.
            ClosedError: If ``close`` was called.
            LateError: If they cannot be answered within ``timeout`` seconds.
            Exception: Whatever the engine raised on one of the inputs.
        """
        if self._closed:
            raise ClosedError("the server is shutting down")
        if self.queued and self.queued + len(inputs) > self._limits.queued_rows:
            raise self._full()
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._arrivals.extend([now] * len(inputs))
        answers = [loop.create_future() for _ in inputs]
        entries = [
            _Entry(given, now, now + timeout, answer, answers) for given, answer in zip(inputs, answers, strict=True)
        ]
        self._new += entries
        self.queued += len(entries)
        self._wake.set()
        try:
            async with asyncio.timeout_at(now + timeout):
                return await asyncio.gather(*answers)
        except (TimeoutError, LateError):
            raise LateError(f"no answer within {timeout:g} s") from None
        finally:
            self.queued -= sum(entry.is_queued for entry in entries)
            for answer in answers:
                answer.cancel()

    async def work(self) -> None:
        """Answer requests until ``close`` is called and none is left."""
        while self._new or self._queue or not self._closed:
            if self._new:
                await self._decide()  # once: while many requests arrive, there are new ones again
            if group := self._next_group():
                await self._run(*group)
            elif not self._new and not self._closed:
                self._wake.clear()
                await self._wake.wait()

    async def _decide(self) -> None:
        """Move new entries to the queue."""
        entries, self._new = [entry for entry in self._new if entry.waits], []
        while part := entries[: self._limits.rows]:
            del entries[: len(part)]
            rows = await _alone_on_failure(self._prepare, [entry.given for entry in part])
            tokens = sum(entry.row.length for entry in self._queue if entry.waits)
            for entry, row in zip(part, rows, strict=True):
                if isinstance(row, Exception):
                    entry.finish(row)
                elif tokens and tokens + row.length > self._limits.queued_tokens:
                    entry.finish(self._full())
                elif entry.waits:
                    entry.row = row
                    self._queue.append(entry)
                    tokens += row.length
        self._queue.sort(key=lambda entry: entry.deadline)

    def _next_group(self) -> tuple[list[_Entry], int] | None:
        """Take the next rows out of the queue, with their operating point."""
        self._queue = [entry for entry in self._queue if entry.waits]
        if not self._queue:
            return None
        now = asyncio.get_running_loop().time()
        while self._arrivals and self._arrivals[0] < now - self._dial.window:
            self._arrivals.popleft()
        oldest = now - min(entry.arrived for entry in self._queue)
        point = self._dial.choose(len(self._queue), oldest, len(self._arrivals) / self._dial.window)
        while self._queue:
            overdue = (index for index, entry in enumerate(self._queue) if now - entry.arrived >= self._limits.max_wait)
            rows = [entry.row for entry in self._queue]
            chosen = best_group(rows, point, next(overdue, None), self._limits, self._cost)
            group = [self._queue[index] for index in chosen]
            is_late = self._refuse_late(group, point, now)
            leaving = set() if is_late else set(group)
            self._queue = [entry for entry in self._queue if entry.waits and entry not in leaving]
            if not is_late:
                for entry in group:
                    entry.is_queued = False
                self.queued -= len(group)
                return group, point
        return None

    def _refuse_late(self, group: list[_Entry], point: int, now: float) -> bool:
        """Refuse entries, earliest deadline first, until the others can be in time; whether there were any."""
        is_late = False
        for entry in sorted(group, key=lambda entry: entry.deadline):
            rows = [member.row for member in group if member.waits]
            if not rows or entry.deadline >= now + self._paces.expected_seconds(rows, point):
                break
            entry.finish(LateError())
            is_late = True
        if is_late:
            self._paces.refused([entry.row for entry in group], point)
        return is_late

    async def _run(self, group: list[_Entry], point: int) -> None:
        loop = asyncio.get_running_loop()
        started, rows = loop.time(), [entry.row for entry in group]
        answers = await _alone_on_failure(lambda some: self._answer(some, point), rows)
        for entry, answer in zip(group, answers, strict=True):
            entry.finish(answer)
        now = loop.time()
        answered = (row for row, answer in zip(rows, answers, strict=True) if not isinstance(answer, Exception))
        self._dial.answered(point, sum(row.is_dialled for row in answered))
        if not any(isinstance(answer, Exception) for answer in answers):
            self._paces.ran(rows, point, now - started)
        self._on_group(Group(rows, answers, [started - entry.arrived for entry in group], now - started, point))

    def _full(self) -> QueueFullError:
        """The error of a full queue. Rows have waited up to ``oldest`` seconds, so half of them take half of that."""
        now = asyncio.get_running_loop().time()
        oldest = max((now - entry.arrived for entry in self._queue), default=0.0)
        return QueueFullError(max(1, math.ceil(oldest / 2)))


async def _alone_on_failure(call: Callable[[list[Any]], Any], items: list[Any]) -> list[Any]:
    """The results of one call for all items; if it fails, of a call per item, with an error where it fails again."""
    try:
        return await call(items)
    except Exception as error:
        if len(items) == 1:
            return [error]
    return [(await _alone_on_failure(call, [item]))[0] for item in items]
