"""Dials on a real server under the arrivals that they were trained on: goodput beside that of the simulation.

    python benchmarks/service_times.py policy runs/agnews-8 --served agnews-onnx --input texts.jsonl > mine.yaml
    sd-gym compare Mine/Serving-v0 --import mine.yaml --algos ppo --seeds 5 --steps 300000 --output runs/dials
    python benchmarks/dials.py runs/agnews-8 --served agnews-onnx --input texts.jsonl runs/dials/*/{fixed,ppo}-*

Each dial has a server process on loopback. An open-loop client sends single inputs, with labels, at the times of the
env's episodes. Goodput is the share that is answered within the deadline, counted from when a request was due. Dials
take turns, with the same requests. One core runs a model, another one the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from rich.console import Console
from rich.table import Table
from sd_gym.agents.serving.controls import FIRST_SEED, play
from serving import Client

from sd_gym.envs.serving.arrivals import arrival_times
from sd_gym.envs.serving.config import ServingConfig
from sd_gym.envs.serving.dial import Dial
from sd_gym.serving.app import Settings
from sd_gym.serving.batcher import Limits
from sd_gym.serving.server import run, service


def serve(policy: str, dial: str, allow_loss: float | None, connection: Any) -> None:
    """The process of one dial; it tells the names of the labels, then its address."""
    config = Dial.load(dial).config
    limits = Limits(rows=config.max_batch, queued_rows=100_000, queued_tokens=10**8)
    served = service(policy, limits, Settings(timeout=config.deadline), allow_loss=allow_loss, threads=1, dial=dial)
    connection.send(served.engine.model.names)
    run(served, "127.0.0.1", 0, connection.send)


async def played(client: Client, bodies: list[bytes], config: ServingConfig, seed: int) -> list[tuple[int, str]]:
    """Play an episode; returns the row and the label of each answer in time."""
    random, loop = seeding.np_random(seed)[0], asyncio.get_running_loop()
    times = arrival_times(config.arrivals, config.load * config.capacity, config.requests, random)
    rows = random.integers(len(bodies), size=config.requests)
    answers: list[tuple[int, str]] = []
    begun = loop.time() + 0.1

    async def one(row: int, due: float) -> None:
        status, _, content = await client.ask(bodies[row])
        if status not in (200, 504):
            raise RuntimeError(f"{status} {content!r}")
        if status == 200 and loop.time() - due <= config.deadline:
            answers.append((row, json.loads(content)[0]["label"]))

    async with asyncio.TaskGroup() as tasks:
        for row, at in zip(rows.tolist(), times.tolist(), strict=True):
            if (wait := begun + at - loop.time()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(row, begun + at))
    return answers


async def measure(
    clients: dict[str, Client], bodies: list[bytes], configs: dict[str, ServingConfig], episodes: int
) -> tuple[dict[str, list[list[tuple[int, str]]]], list[str]]:
    """Answers in time by dial, a list per episode, and the dense label of each row."""
    for client in clients.values():
        while (await client.ask(bodies[0]))[0] == 503:
            await asyncio.sleep(0.1)
    first, *_ = clients.values()
    dense = [await label(first, body) for body in bodies]
    answers: dict[str, list[list[tuple[int, str]]]] = defaultdict(list)
    for episode, (dial, client) in itertools.product(range(episodes), clients.items()):
        answers[dial].append(await played(client, bodies, configs[dial], FIRST_SEED["test"] + episode))
    return answers, dense


async def label(client: Client, body: bytes) -> str:
    """The dense label of an input: that of the last operating point."""
    last = json.dumps(json.loads(body) | {"max_loss": 0.0}).encode()
    return json.loads((await client.ask(last))[2])[0]["label"]


def main() -> None:
    """Play all dials and print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of few masks")
    parser.add_argument("dials", nargs="+", help="runs on a serving env with this policy")
    parser.add_argument("--served", help="what sd-gym export wrote of it, if that is what the server runs")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with a text and its label")
    parser.add_argument("--allow-loss", type=float, help="as of sd-gym serve")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=3)
    arguments = parser.parse_args()
    with arguments.input.open() as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, arguments.texts)]
    bodies = [json.dumps({"inputs": row["text"]}).encode() for row in rows]
    context, clients, processes, names = multiprocessing.get_context("spawn"), {}, [], {}
    try:
        for dial in arguments.dials:
            ours, theirs = context.Pipe()
            options = arguments.served or arguments.run, dial, arguments.allow_loss, theirs
            processes.append(context.Process(target=serve, args=options, daemon=True))
            processes[-1].start()
            theirs.close()  # so that a server that fails is not waited for
            names = ours.recv()
            clients[dial] = Client(ours.recv())
        configs = {dial: Dial.load(dial).config for dial in arguments.dials}
        answers, dense = asyncio.run(measure(clients, bodies, configs, arguments.episodes))
    finally:
        for process in processes:
            process.terminate()
    right = [names[row["label"]] for row in rows]
    table = Table("dial", "goodput, server", "of each episode", "goodput, env", "points lost")
    for dial, config in configs.items():
        goodput = [len(episode) / config.requests for episode in answers[dial]]
        simulated = play(config, [Dial.load(dial).network], "test", arguments.episodes).goodput.mean()
        pairs = [pair for episode in answers[dial] for pair in episode]
        lost = np.mean([(dense[row] == right[row]) - (label == right[row]) for row, label in pairs])
        cells = f"{np.mean(goodput):.1%}", " ".join(f"{one:.1%}" for one in goodput), f"{simulated:.1%}"
        table.add_row(dial, *cells, f"{100 * lost:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
