"""Goodput of dials in a real server, under the bursts of a serving env.

    sd-gym train SD/Serving-TREC-Table-v0 --algo ppo --steps 300000 --output runs/dial
    python benchmarks/dial.py runs/trec --input trec.jsonl --dials runs/dial --points 0 1 3

The first argument is any policy of one look for the backbone of the env's table. The server runs the masks of the env's
operating points instead of its decisions. The input has texts and labels. Each arm is a server process on loopback, one
after the other: some fixed points, then the dials. All get the same requests, at the times of the env's arrivals. This
machine may be slower than the one that the env's service times come from, so that all times are stretched: the highest
rate of dense is measured first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from serving import Arm, Client, capacity

import sd_gym
from sd_gym.envs.serving import dial
from sd_gym.envs.serving.arrivals import arrival_times
from sd_gym.envs.serving.config import ServingConfig
from sd_gym.inference.texts import SkippingModel
from sd_gym.operating_points import OperatingPoint
from sd_gym.serving.app import Service, Settings
from sd_gym.serving.batcher import Limits, Row
from sd_gym.serving.dial import Fixed, Trained
from sd_gym.serving.engine import Asked, OperatingPoints, TextEngine
from sd_gym.serving.server import run

LIMITS = Limits(queued_rows=100_000, queued_tokens=10**8)
LONG = 600.0  # seconds; a deadline that is never met


class Masks(TextEngine):
    """Every operating point is one mask for all rows: those of the env, dense last."""

    def __init__(self, model: SkippingModel, masks: NDArray) -> None:
        super().__init__(model, points_of(len(masks)), range(len(masks)))
        self._decisions, self._masks, self.groups_masks = masks, np.unique(masks, axis=0), True

    def _prepared(self, inputs: list[Asked]) -> list[Row]:
        split = self.model.split([asked.texts for asked in inputs])
        decisions = np.tile(self._decisions, (len(inputs), 1, 1))
        return list(map(self._row, inputs, split.encoded.source_length.tolist(), decisions))


def points_of(count: int) -> OperatingPoints:
    """Points that a request or a dial may choose."""
    return OperatingPoints([OperatingPoint(float(number), 0.0, 0.0, 1.0, True) for number in range(count)])


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


def serve(policy: str, backbone: str, masks: NDArray, arm: int | str, slower: float, timeout: float, pipe: Any) -> None:
    """The process of an arm: a fixed point of the env, or the folder of a dial."""
    torch.set_num_threads(1)
    engine, count = Masks(sd_gym.load(policy, backbone), masks[::-1]), len(masks)
    chosen = Fixed(count - 1 - arm) if isinstance(arm, int) else Stretched(arm, count, slower)
    own = Service(engine, points_of(count), LIMITS, Settings(timeout=timeout), chosen)
    run(own, "127.0.0.1", 0, lambda address: pipe.send((address, engine.model.names)))


class Played(NamedTuple):
    """What an arm answered of the requests of an episode."""

    goodput: float
    loss: float  # mean quality_ref - quality of the answers
    p50: float  # seconds, of the answers


async def answered(client: Client, text: Any, **options: Any) -> str | None:
    """The label of a text, or nothing if it was refused."""
    status, _, content = await client.ask(json.dumps({"inputs": text, **options}).encode())
    if status not in (200, 429, 504):
        raise RuntimeError(f"{status} {content!r}")
    return json.loads(content)[0]["label"] if status == 200 else None


async def reference(client: Client, texts: list[Any], dense: int) -> list[str | None]:
    """Dense's answers to all texts."""
    few = asyncio.Semaphore(32)

    async def one(text: Any) -> str | None:
        async with few:
            return await answered(client, text, point=dense)

    return await asyncio.gather(*map(one, texts))


async def played(client: Client, texts: list[Any], times: NDArray, rows: NDArray, cost: Any, within: float) -> Played:
    """Send requests at their times; what is answered later than ``within`` seconds does not count."""
    loop = asyncio.get_running_loop()
    begun, latencies, costs = loop.time() + 0.1, [], []

    async def one(row: int, due: float) -> None:
        await asyncio.sleep(due - loop.time())
        label = await answered(client, texts[row])
        if label is not None and loop.time() - due <= within:
            latencies.append(loop.time() - due)
            costs.append(cost(row, label))

    await asyncio.gather(*(one(row, begun + at) for row, at in zip(rows.tolist(), times.tolist(), strict=True)))
    return Played(len(costs) / len(times), float(np.mean(costs)), float(np.median(latencies)))


async def ready(client: Client, text: Any) -> None:
    """Wait until the server has warmed up."""
    while (await client.ask(json.dumps({"inputs": text}).encode()))[0] == 503:
        await asyncio.sleep(0.2)


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
    config = dial.Dial.load(arguments.dials[0]).config
    rows = [json.loads(line) for line in arguments.input.read_text().splitlines()]
    labels = [row.pop("label") for row in rows]
    context, masks = multiprocessing.get_context("spawn"), np.array([point.mask for point in config.points])
    random, slower, table = np.random.default_rng(arguments.seed), 1.0, Table(title=config.id)
    for column in ("arm", "goodput", "lost", "median latency"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    rates, asked = arrival_times(config.arrivals, config.load, arguments.requests, random), len(rows)
    picked, lost = random.integers(asked, size=arguments.requests), None
    for arm in ["measured", *arguments.points, *arguments.dials]:
        ours, theirs = context.Pipe()
        timeout = LONG if arm == "measured" else slower * config.deadline
        own = 0 if arm == "measured" else arm
        options = arguments.policy, arguments.backbone, masks, own, slower, timeout, theirs
        process = context.Process(target=serve, args=options, daemon=True)
        process.start()
        theirs.close()  # so that a server that fails is not waited for
        try:
            address, names = ours.recv()
            client = Client(address)
            if lost is None:
                slower, lost = asyncio.run(measured(client, rows, labels, names, config))
            else:
                rate = config.capacity / slower
                result = asyncio.run(episode(client, rows, rates / rate, picked, lost, timeout))
                name = f"point {arm}" if isinstance(arm, int) else Path(arm).name
                table.add_row(name, f"{result.goodput:.1%}", f"{100 * result.loss:.2f}", f"{result.p50:.2f} s")
                Console().print(table)
        finally:
            process.terminate()
            process.join()
    Console().print(f"dense: {config.capacity / slower:.0f} requests/s; deadline {slower * config.deadline:.2f} s")


async def measured(
    client: Client, texts: list[Any], labels: list[Any], names: dict[int, str], config: ServingConfig
) -> tuple[float, Any]:
    """How much slower than in the env dense is here, and the cost of an answer by row and label."""
    await ready(client, texts[0])
    right = [names.get(label, label) for label in labels]
    by_dense = await reference(client, texts, len(config.points) - 1)
    bodies = [json.dumps({"inputs": text}).encode() for text in texts]
    rate = await capacity(Arm("dense", client), bodies, 8.0)

    def cost(row: int, label: str) -> int:
        return int(by_dense[row] == right[row]) - int(label == right[row])

    return config.capacity / rate, cost


async def episode(client: Client, texts: list[Any], times: NDArray, rows: NDArray, cost: Any, within: float) -> Played:
    """The requests of an episode, once the server is warm."""
    await ready(client, texts[0])
    await reference(client, texts[:64], 0)
    return await played(client, texts, times, rows, cost, within)


if __name__ == "__main__":
    main()
