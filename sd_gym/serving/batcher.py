"""Requests in, answers out: requests are decided before they queue, and those that share a mask run together.

It knows neither HTTP nor torch. Its clock is that of the event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


class QueueFullError(Exception):
    """The queue has no room.

    Attributes:
        retry_after: Seconds, after which it may have some.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """No requests are taken any more."""


class LateError(Exception):
    """The deadline has passed."""


class Row(NamedTuple):
    """One input, decided on.

    Attributes:
        length: Its tokens.
        masks: For each operating point, what it skips.
        kind: Only rows of one kind can run together.
        content: What the engine needs to answer it.
    """

    length: int
    masks: Sequence[Hashable]
    kind: Hashable
    content: Any


class Engine(Protocol):
    """What decides and answers; it is asked for one thing at a time."""

    async def prepare(self, inputs: list[Any]) -> list[Row]:
        """Decide on inputs. An error is tried again input by input, and then is that of one input."""
        ...

    async def run(self, rows: list[Row], point: int) -> list[Any]:
        """The answers of rows of one kind at an operating point; of errors the same is true."""
        ...


class Dial(Protocol):
    """Chooses the operating point of a group before it is formed."""

    def choose(self, queue_length: int, oldest_wait: float, arrival_rate: float) -> int:
        """The index of an operating point, from the rows that wait, seconds, and rows a second."""
        ...


class Fixed(NamedTuple):
    """The dial that always chooses the same."""

    point: int = 0

    def choose(self, queue_length: int, oldest_wait: float, arrival_rate: float) -> int:
        """That one."""
        return self.point


class Group(NamedTuple):
    """Rows that ran together."""

    rows: list[Row]
    answers: list[Any]
    waits: list[float]  # seconds of each row from its arrival to its start
    seconds: float  # of running
    point: int  # the operating point


@dataclass(frozen=True)
class Limits:
    """Of the queue and of a group.

    Attributes:
        rows: Rows of a group at most.
        tokens: Padded tokens of a group at most; a row of more runs alone.
        queued_rows: Rows that wait at most.
        queued_tokens: Their tokens at most.
        max_wait: Seconds for which larger groups may be preferred to a row; then the oldest deadline comes first.
    """

    rows: int = 32
    tokens: int = 8192
    queued_rows: int = 1024
    queued_tokens: int = 131_072
    max_wait: float = 0.05


class PassCost(NamedTuple):
    """What a pass takes beside computing its rows, in the tokens that take as long.

    Attributes:
        one_mask: If its rows share a mask. A row joins a group if it adds less padding than this.
        mixed: If they do not; infinite if that is not possible.
        mixed_row: Each of its rows then.
    """

    one_mask: float
    mixed: float = math.inf
    mixed_row: float = 0.0


@dataclass(eq=False)
class _Entry:
    given: Any
    arrived: float
    deadline: float
    answer: asyncio.Future[Any]
    row: Row = field(init=False)  # once it is decided

    @property
    def waits(self) -> bool:
        return not self.answer.done()


class Batcher:
    """Queues inputs and answers them in groups; ``work`` has to run beside.

    Args:
        engine: Decides and answers.
        limits: Of the queue and of a group.
        cost: What a pass takes, by which rows are grouped.
        dial: Chooses the operating point of each group.
        on_group: Is told of each group that was answered.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        cost: PassCost,
        dial: Dial = Fixed(),  # noqa: B008  (it never changes)
        on_group: Callable[[Group], None] | None = None,
    ) -> None:
        self._engine, self.limits, self._cost, self._dial, self._on_group = engine, limits, cost, dial, on_group
        self._new: list[_Entry] = []  # not decided yet
        self._queue: list[_Entry] = []
        self._wake = asyncio.Event()
        self._closed = False
        self._arrivals, self._served = _Rate(), _Rate()

    @property
    def queued(self) -> int:
        """Rows that wait."""
        return sum(entry.waits for entries in (self._new, self._queue) for entry in entries)

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def close(self) -> None:
        """Take no more requests; ``work`` ends when all that were taken are answered."""
        self._closed = True
        self._wake.set()

    async def answer(self, inputs: Sequence[Any], timeout: float) -> list[Any]:
        """The answers to the inputs of one request, in their order; cancelled, it leaves the queue.

        Raises:
            QueueFullError: If there is no room for all of them.
            ClosedError: If ``close`` was called.
            LateError: If there is no answer after so many seconds.
            Exception: Whatever the engine raised on one of the inputs.
        """
        if self._closed:
            raise ClosedError("the server is shutting down")
        if self.queued + len(inputs) > self.limits.queued_rows:
            raise self._full()
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._arrivals.count(now, len(inputs))
        entries = [_Entry(given, now, now + timeout, loop.create_future()) for given in inputs]
        self._new += entries
        self._wake.set()
        try:
            async with asyncio.timeout_at(now + timeout):
                return await asyncio.gather(*(entry.answer for entry in entries))
        except TimeoutError:
            raise LateError(f"no answer within {timeout:g} s") from None
        finally:
            for entry in entries:
                entry.answer.cancel()  # where one row failed, the others need no answer any more

    async def work(self) -> None:
        """Answer requests until ``close`` is called and none is left."""
        while True:
            if self._new:
                await self._decide()
            elif group := self._next_group():
                await self._run(*group)
            elif self._closed:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _decide(self) -> None:
        """Move what has arrived to the queue."""
        entries, self._new = [entry for entry in self._new if entry.waits], []
        for part in (entries[at : at + self.limits.rows] for at in range(0, len(entries), self.limits.rows)):
            rows = await _each_alone_if_any_fails(self._engine.prepare, [entry.given for entry in part])
            tokens = sum(entry.row.length for entry in self._queue if entry.waits)
            for entry, row in zip(part, rows, strict=True):
                if isinstance(row, Exception):
                    _finish(entry, row)
                elif tokens and tokens + row.length > self.limits.queued_tokens:
                    _finish(entry, self._full())
                elif entry.waits:
                    entry.row = row
                    self._queue.append(entry)
                    tokens += row.length

    def _next_group(self) -> tuple[list[_Entry], int] | None:
        """The rows that run next, which leave the queue, and their operating point."""
        self._queue = [entry for entry in self._queue if entry.waits]
        if not self._queue:
            return None
        now = asyncio.get_running_loop().time()
        oldest = max(now - entry.arrived for entry in self._queue)
        point = self._dial.choose(len(self._queue), oldest, self._arrivals.at(now))
        by_deadline = sorted(self._queue, key=lambda entry: entry.deadline)
        if oldest >= self.limits.max_wait:
            first = next(entry for entry in by_deadline if now - entry.arrived >= self.limits.max_wait)
        else:
            count = Counter(entry.row.masks[point] for entry in by_deadline)
            first = max(by_deadline, key=lambda entry: count[entry.row.masks[point]])  # of equal ones the earliest
        of_kind = [entry for entry in by_deadline if entry.row.kind == first.row.kind]
        of_mask = [entry for entry in of_kind if entry.row.masks[point] == first.row.masks[point]]
        group, mixed = self._filled(first, of_mask), self._filled(first, of_kind)
        if self._cost.mixed / len(mixed) + self._cost.mixed_row < self._cost.one_mask / len(group):
            group = mixed
        chosen = set(group)
        self._queue = [entry for entry in self._queue if entry not in chosen]
        return group, point

    def _filled(self, first: _Entry, candidates: list[_Entry]) -> list[_Entry]:
        """A group with ``first``, and with as many others as fit, of about its length."""
        group, longest = [first], first.row.length
        for entry in candidates:
            if len(group) == self.limits.rows:
                break
            length = max(longest, entry.row.length)
            padded = (len(group) + 1) * length
            padding = padded - len(group) * longest - entry.row.length  # more of it
            if entry is not first and padded <= self.limits.tokens and padding <= self._cost.one_mask:
                group.append(entry)
                longest = length
        return group

    async def _run(self, group: list[_Entry], point: int) -> None:
        loop = asyncio.get_running_loop()
        started, rows = loop.time(), [entry.row for entry in group]
        answers = await _each_alone_if_any_fails(lambda some: self._engine.run(some, point), rows)
        for entry, answer in zip(group, answers, strict=True):
            _finish(entry, answer)
        now = loop.time()
        self._served.count(now, len(group))
        if self._on_group is not None:
            waits = [started - entry.arrived for entry in group]
            self._on_group(Group(rows, answers, waits, now - started, point))

    def _full(self) -> QueueFullError:
        """Room is there again when about half of the queue is answered."""
        rate = self._served.at(asyncio.get_running_loop().time())
        return QueueFullError(math.ceil(min(60.0, 1 + self.queued / 2 / max(rate, 1e-3))))


async def _each_alone_if_any_fails(call: Callable[[list[Any]], Any], items: list[Any]) -> list[Any]:
    """What a call gives for all items; where it fails, for each item what it gives, or raises, for that one alone."""
    try:
        return await call(items)
    except Exception as error:
        if len(items) == 1:
            return [error]
    return [(await _each_alone_if_any_fails(call, [item]))[0] for item in items]


def _finish(entry: _Entry, answer: Any) -> None:
    """Give an entry its answer, or its error, if anybody still waits for it."""
    if not entry.waits:
        return
    if isinstance(answer, Exception):
        entry.answer.set_exception(answer)
    else:
        entry.answer.set_result(answer)


class _Rate:
    """How many things happen in a second, lately: what happened a second ago counts a third of what happens now."""

    def __init__(self) -> None:
        self._value, self._last = 0.0, 0.0

    def at(self, now: float) -> float:
        return self._value * math.exp(self._last - now)

    def count(self, now: float, number: int) -> None:
        self._value, self._last = self.at(now) + number, now
