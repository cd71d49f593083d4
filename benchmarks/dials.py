"""Dials on a real server under the arrivals that they were trained on: goodput beside that of the simulation.

    python benchmarks/service_times.py policy runs/agnews-8 --served agnews-onnx --input texts.jsonl > mine.yaml
    sd-gym compare Mine/Serving-v0 --import mine.yaml --algos ppo --seeds 5 --steps 300000 --output runs/dials
    python benchmarks/dials.py runs/agnews-8 --served agnews-onnx --input texts.jsonl runs/dials/*/ppo-* --points 0 4

Each dial has a server process on loopback. An open-loop client sends single inputs, with labels, at the times of the
env's episodes. Goodput is the share that is answered within the deadline, counted from when a request was due. Dials
take turns, with the same requests; ``--points`` adds fixed points of the env. One core runs a model, another one the
rest.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from rich.console import Console
from rich.table import Table
from sd_gym.agents.serving.controls import FIRST_SEED, MIXTURES, fixed, play
from serving import Client, started

from sd_gym.envs.serving.arrivals import arrival_times
from sd_gym.envs.serving.config import ServingConfig
from sd_gym.envs.serving.dial import Dial, Network
from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.server import run, service


def serve(policy: str, dial: str, allow_loss: float | None, connection: Any) -> None:
    """The process of one dial; it tells the names of the labels, the points of its dial, then its address."""
    config = Dial.load(dial).config
    limits = Limits(rows=config.max_batch, queued_rows=100_000, queued_tokens=10**8)
    served = service(
        policy, limits, RequestLimits(timeout=config.deadline), allow_loss=allow_loss, threads=1, dial=dial
    )
    connection.send((served.engine.model.names, served.dial.points))
    run(served, "127.0.0.1", 0, connection.send)


@dataclass
class Arm:
    """A dial on its server, or a fixed point, and its answers."""

    client: Client
    config: ServingConfig
    network: Network
    request: dict[str, int] = field(default_factory=dict)  # added to each request
    episodes: list[list[tuple[int, str]]] = field(default_factory=list)  # row and label of each answer in time

    async def play(self, texts: list[str], seed: int) -> None:
        """Play an episode."""
        config, random, loop = self.config, seeding.np_random(seed)[0], asyncio.get_running_loop()
        times = arrival_times(config.arrivals, config.load * config.capacity, config.requests, random)
        rows = random.integers(len(texts), size=config.requests)
        answers: list[tuple[int, str]] = []
        begun = loop.time() + 0.1

        async def one(row: int, due: float) -> None:
            label = await ask(self.client, texts[row], **self.request)
            if label is not None and loop.time() - due <= config.deadline:
                answers.append((row, label))

        async with asyncio.TaskGroup() as tasks:
            for row, at in zip(rows.tolist(), times.tolist(), strict=True):
                if (wait := begun + at - loop.time()) > 0:
                    await asyncio.sleep(wait)
                tasks.create_task(one(row, begun + at))
        self.episodes.append(answers)


async def ask(client: Client, text: str, **how: float) -> str | None:
    """The label of a text; ``None`` if it comes too late, or the server is not ready."""
    status, _, content = await client.ask(json.dumps({"inputs": text, **how}).encode())
    if status not in (200, 503, 504):
        raise RuntimeError(f"{status} {content!r}")
    return json.loads(content)[0]["label"] if status == 200 else None


async def measure(arms: dict[str, Arm], texts: list[str], episodes: int) -> list[str | None]:
    """Play all arms; returns the dense label of each text."""
    for arm in arms.values():
        while await ask(arm.client, texts[0]) is None:
            await asyncio.sleep(0.1)
    first, *_ = arms.values()
    dense = [await ask(first.client, text, max_loss=0.0) for text in texts]
    for episode, arm in itertools.product(range(episodes), arms.values()):
        await arm.play(texts, FIRST_SEED["test"] + episode)
    return dense


def main() -> None:
    """Play all dials and print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of few masks")
    parser.add_argument("dials", nargs="+", help="runs on a serving env with this policy")
    parser.add_argument("--served", help="what sd-gym export wrote of it, if that is what the server runs")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with a text and its label")
    parser.add_argument("--allow-loss", type=float, help="as of sd-gym serve")
    parser.add_argument("--points", type=int, nargs="*", default=[], help="fixed points of the env; 0 is dense")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=3)
    arguments = parser.parse_args()
    with arguments.input.open() as lines:
        rows = [json.loads(line) for line in itertools.islice(filter(str.strip, lines), arguments.texts)]
    texts = [row["text"] for row in rows]
    arms, names, points = dict[str, Arm](), {}, list[int]()
    for folder in arguments.dials:
        server = started(serve, arguments.served or arguments.run, folder, arguments.allow_loss)
        (names, points), dial = server.recv(), Dial.load(folder)
        arms[folder] = Arm(Client(server.recv()), dial.config, dial.network)
    first, *_ = arms.values()
    for point in arguments.points:  # the server has more points, and counts from the other end
        only = fixed(first.config)[point * (1 + len(MIXTURES))]
        arms[f"point {point}"] = Arm(first.client, first.config, only, {"point": points[-1 - point]})
    dense = asyncio.run(measure(arms, texts, arguments.episodes))
    right = [names.get(row["label"], row["label"]) for row in rows]  # data may have numbers or names
    table = Table("dial", "goodput, server", "of each episode", "goodput, env", "points lost")
    for name, arm in arms.items():
        goodput = [len(episode) / arm.config.requests for episode in arm.episodes]
        simulated = play(arm.config, [arm.network], "test", arguments.episodes).goodput.mean()
        answers = [answer for episode in arm.episodes for answer in episode]
        lost = np.mean([(dense[row] == right[row]) - (label == right[row]) for row, label in answers])
        cells = f"{np.mean(goodput):.1%}", " ".join(f"{one:.1%}" for one in goodput), f"{simulated:.1%}"
        table.add_row(name, *cells, f"{100 * lost:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
