"""Goodput of dials in the real batcher with the real model, under the bursts of a serving env.

    sd-gym train SD/Serving-TREC-Table-v0 --algo ppo --steps 300000 --output runs/dial
    python benchmarks/dial.py runs/trec --input trec.jsonl --dials runs/dial --points 0 1 3

The first argument is any run of one look for the backbone of the env's table; the masks of the env's operating points
run instead of its decisions. The input has texts and labels. The clock is simulated: time passes only while the model
computes, by its thread's own time, which other processes on the machine hardly change. Tokenising counts, HTTP does
not. This machine may be slower than the one of the env's times, so all times are stretched by the rate of dense.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import selectors
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import sd_gym
from sd_gym.envs.serving import dial
from sd_gym.envs.serving.arrivals import arrival_times
from sd_gym.inference.texts import SkippingModel
from sd_gym.operating_points import OperatingPoint
from sd_gym.serving.batcher import Batcher, LateError, Limits, PassCost, Row
from sd_gym.serving.dial import Dial, Fixed, Trained
from sd_gym.serving.engine import Asked, OperatingPoints, Served, TextEngine

LIMITS = Limits(queued_rows=100_000, queued_tokens=10**8)
ROUNDS = 12  # full groups of dense, of which the fastest counts


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time jumps to the next thing that is due."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.now = 0.0

    def time(self) -> float:
        """Simulated seconds."""
        return self.now

    def _run_once(self) -> None:
        loop: Any = self
        while not loop._ready and loop._scheduled and loop._scheduled[0]._cancelled:
            heapq.heappop(loop._scheduled)._scheduled = False
            loop._timer_cancelled_count -= 1
        if not loop._ready and loop._scheduled:
            self.now = max(self.now, loop._scheduled[0]._when)
        super()._run_once()  # pyright: ignore[reportAttributeAccessIssue]


class Masks(TextEngine):
    """Every operating point is one mask for all rows: those of the env, dense last."""

    def __init__(self, model: SkippingModel, masks: NDArray) -> None:
        points = [OperatingPoint(float(number), 0.0, 0.0, 1.0, True) for number in range(len(masks))]
        super().__init__(model, OperatingPoints(points), range(len(masks)))
        self._decisions, self._masks, self.groups_masks = masks, np.unique(masks, axis=0), True

    def _prepared(self, inputs: list[Asked]) -> list[Row]:
        split = self.model.split([asked.texts for asked in inputs])
        decisions = np.tile(self._decisions, (len(inputs), 1, 1))
        return list(map(self._row, inputs, split.encoded.source_length.tolist(), decisions))


class Timed:
    """An engine whose calls take as much simulated time as its thread computes."""

    def __init__(self, engine: Masks) -> None:
        self._engine = engine

    async def prepare(self, inputs: list[Asked]) -> list[Row]:
        """See ``Engine``."""
        return await self._timed(self._engine.prepare, inputs)

    async def run(self, rows: list[Row], point: int) -> list[Served]:
        """See ``Engine``."""
        return await self._timed(self._engine.run, rows, point)

    async def _timed(self, call: Callable[..., Any], *given: Any) -> Any:
        started = time.thread_time()
        result = call(*given)
        await asyncio.sleep(time.thread_time() - started)
        return result


class Stretched(Trained):
    """A trained dial on a machine that is slower by a factor."""

    def __init__(self, folder: str, points: int, slower: float) -> None:
        super().__init__(folder, points)
        config = self._dial.config
        slow = [
            point.model_copy(update={"per_request": slower * point.per_request, "per_group": slower * point.per_group})
            for point in config.points
        ]
        self._dial.config = config.model_copy(update={"points": tuple(slow), "deadline": slower * config.deadline})


class Played(NamedTuple):
    """What was answered of the requests of an episode."""

    goodput: float
    loss: float  # mean quality_ref - quality of the answers
    p50: float  # simulated seconds, of the answers


def label_of(served: Served) -> str:
    """The answered label."""
    return str(served.answer.answer)


async def played(
    engine: Masks, cost: PassCost, chosen: Dial, asked: list[Asked], times: NDArray, losses: Any, within: float
) -> Played:
    """Send requests at their times; each has a deadline of ``within`` seconds."""
    batcher = Batcher(Timed(engine), LIMITS, cost, chosen)
    loop, latencies, lost = asyncio.get_running_loop(), [], []
    work = asyncio.create_task(batcher.work())

    async def one(number: int, due: float) -> None:
        await asyncio.sleep(due - loop.time())
        try:
            (served,) = await batcher.answer([asked[number]], within)
        except LateError:
            return
        latencies.append(loop.time() - due)
        lost.append(losses(number, label_of(served)))

    await asyncio.gather(*(one(number, due) for number, due in enumerate(times.tolist())))
    batcher.close()
    await work
    return Played(len(lost) / len(times), float(np.mean(lost)), float(np.median(latencies)))


def rate_of_dense(engine: Masks, asked: list[Asked], size: int, dense: int) -> float:
    """Requests a second of full groups."""
    seconds = []
    for first in range(0, ROUNDS * size, size):
        started = time.thread_time()
        engine.run(engine.prepare([asked[number % len(asked)] for number in range(first, first + size)]), dense)
        seconds.append(time.thread_time() - started)
    return size / min(seconds)


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="a run of one look for the backbone")
    parser.add_argument("--backbone", help="where the backbone is, if not where it was")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with the task's fields and a label")
    parser.add_argument("--dials", nargs="+", required=True, help="runs of one serving env")
    parser.add_argument("--points", nargs="*", type=int, default=[0], help="fixed points of the env, 0 is dense")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = dial.Dial.load(arguments.dials[0]).config
    last = len(config.points) - 1
    masks = np.array([point.mask for point in config.points])[::-1]
    engine = Masks(sd_gym.load(arguments.policy, arguments.backbone), masks)
    rows = [json.loads(line) for line in arguments.input.read_text().splitlines()]
    labels = [row.pop("label") for row in rows]
    right = [engine.model.names.get(label, str(label)) for label in labels]
    asked = [Asked(engine.checked(row)) for row in rows]
    cost = engine.warm_up()
    rate = rate_of_dense(engine, asked, config.max_batch, last)
    slower = config.capacity / rate
    by_dense = [label_of(one) for one in engine.run(engine.prepare(asked), last)]
    random = np.random.default_rng(arguments.seed)
    times = arrival_times(config.arrivals, config.load * rate, arguments.requests, random)
    picked = random.integers(len(rows), size=arguments.requests)

    def losses(number: int, label: str) -> int:
        row = picked[number]
        return int(by_dense[row] == right[row]) - int(label == right[row])

    console, table = Console(), Table(title=f"{rate:.0f} requests/s densely, deadline {slower * config.deadline:.2f} s")
    for column in ("arm", "goodput", "points lost", "median latency"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    arms: list[tuple[str, Dial]] = [
        (f"point {point}", Fixed(last - point, slower * config.deadline)) for point in arguments.points
    ]
    arms += [(Path(folder).name, Stretched(folder, last + 1, slower)) for folder in arguments.dials]
    for name, chosen in arms:
        requests = [asked[row] for row in picked]
        with asyncio.Runner(loop_factory=Clock) as runner:
            episode = played(engine, cost, chosen, requests, times, losses, slower * config.deadline)
            result = runner.run(episode)
        table.add_row(name, f"{result.goodput:.1%}", f"{100 * result.loss:.2f}", f"{result.p50:.2f} s")
        console.print(f"{name}: {result}")
    console.print(table)


if __name__ == "__main__":
    main()
