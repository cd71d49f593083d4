"""What grouping by mask is worth under load: highest rates at equal p99 latency, and latency curves as a picture.

    sd-gym reduce runs/reviews --codebook 8 --output runs/reviews-8
    python benchmarks/serving.py runs/reviews-8 --input texts.jsonl --output serving

Each arm is a server process on loopback. An open-loop client sends single inputs at a known rate, come answers or
not; latency counts from when a request was due. All arms take turns, so a busy moment hurts all of them. The
limit of p99 is five times dense's latency of one request alone. One core runs a model, another one the rest.
``--dial RUN`` adds an arm with a dial. With six arms it takes about seven minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from sd_gym.serving.app import Service
from sd_gym.serving.engine import Asked, BlockingEngine, GraphEngine, Served, TextEngine
from sd_gym.serving.grouping import PassCost, Row
from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.server import run, service, timeout_of

ARMS = ("dense", "dense, by length", "one mask", "policy, ungrouped", "policy, grouped")
DIAL = "policy, with the dial"
PATTERNS = ("poisson", "constant", "bursts")
TIMES_DENSE = 5.0  # of dense's latency of one request: the limit of p99
OVERLOADED = 503, 504  # a full queue, or a timeout in it
BACKLOG = 400  # requests under way at which a rate is too high
BURST = 16  # requests that arrive at once, in bursts
ACCEPTS = -1e4  # a bias with which no answer is continued densely


class AsTheyCome:
    """An engine that runs rows of all masks and lengths as they come; a graph has one mask, so it cuts them then."""

    groups_masks = False

    def __init__(self, engine: BlockingEngine) -> None:
        self.served, self.checked, self._engine = engine.served, engine.checked, engine

    def prepare(self, inputs: list[Asked]) -> list[Row]:
        """All rows are alike."""
        return [Row(row.length, [b""] * len(row.masks), row.kind, row) for row in self._engine.prepare(inputs)]

    def run(self, rows: list[Row], point: int) -> list[Served]:
        """The rows of each mask by themselves."""
        served: dict[int, Served] = {}
        masks = [row.content.masks[point] for row in rows]
        for mask in set(masks):
            picked = [number for number, own in enumerate(masks) if own == mask]
            served |= zip(picked, self._engine.run([rows[number].content for number in picked], point), strict=True)
        return [served[number] for number in range(len(rows))]

    def warm_up(self) -> PassCost:
        """Padding does not count."""
        self._engine.warm_up()
        return PassCost(1e6)  # more tokens than any group has


def serve_arm(
    arm: str, policy: str, backbone: str | None, threads: int, texts: list[Any], dial: str | None, connection: Any
) -> None:
    """The process of one arm; it tells its address."""
    dial = dial if arm == DIAL else None
    limits, settings = Limits(queued_rows=10_000, queued_tokens=10**7), RequestLimits(timeout_of(None, dial))
    served = service(policy, limits, settings, backbone=backbone, threads=threads, dial=dial)
    if dial is None:
        served = Service(engine_of(arm, served, texts), served.points, limits, settings)
    run(served, "127.0.0.1", 0, connection.send)


def engine_of(arm: str, served: Service, texts: list[Any]) -> BlockingEngine:
    """What answers in an arm."""
    engine: Any = served.engine
    if arm == "policy, grouped":
        return engine
    if arm == "policy, ungrouped":
        if isinstance(engine, GraphEngine):
            return AsTheyCome(engine)
        engine._masks, engine.groups_masks = None, False  # one pass on the switchboard
        vars(engine.model)["_bank"] = None
        return engine
    mask: Any = None  # dense
    if arm == "one mask":
        rows = engine.prepare([Asked(engine.checked(text)) for text in texts])
        masks = Counter(row.masks[served.points.default] for row in rows)
        mask = next((mask for mask, _ in masks.most_common() if _skips(mask)), None)
    _decide_always(engine, mask)
    return AsTheyCome(engine) if arm == "dense" else engine


def _skips(mask: int | bytes) -> bool:
    """Whether a mask, the number of a graph or a decision's bytes, is another one than dense."""
    return any(mask) if isinstance(mask, bytes) else mask > 0


def _decide_always(engine: Any, mask: Any) -> None:
    """Have an engine skip the same of all rows; nobody decides."""
    if isinstance(engine, TextEngine):
        switches = len(engine.model.board) + 1
        decision = np.frombuffer(mask, dtype=np.int64) if mask else np.zeros(switches, dtype=np.int64)
        for policy in engine._policies if engine.model.policy.has_answer_stage else ():
            policy.learned.head.bias.data[-1] = ACCEPTS
        engine._masks = decision[None]
        changes = {
            "decided_at": lambda policies, split: np.tile(decision, (len(policies), len(split), 1)),
            "own_flops": lambda split: np.zeros(len(split)),
        }
    else:
        changes = {
            "decide_at": lambda margins, batch: (
                np.full((len(batch["input_ids"]), len(margins)), mask or 0),
                np.zeros((len(batch["input_ids"]), 0)),
            ),
            "own_flops": lambda length: np.zeros(len(length)),
            "has_answer_stage": False,
        }
    for name, change in changes.items():
        getattr(engine.model, name)  # raises if it is called otherwise now
        setattr(engine.model, name, change)


def started(serve: Callable[..., None], *options: Any) -> Connection:
    """Start the process of a server, which ends with this one; returns the connection that it was given, too."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(*options, theirs), daemon=True).start()
    theirs.close()  # so that a server that fails is not waited for
    return ours


class Client:
    """Keeps connections to one server."""

    def __init__(self, address: str) -> None:
        self.host, port = address.removeprefix("http://").split(":")
        self.port = int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, body: bytes, path: str = "/predict") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of a response."""
        while self._idle and self._idle[-1][0].at_eof():  # the server has closed it
            self._idle.pop()[1].close()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self.host, self.port)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        content = await reader.readexactly(int(headers["content-length"]))
        self._idle.append((reader, writer))
        return int(head[0].split()[1]), headers, content


class Probe(NamedTuple):
    """One rate, tried for some seconds."""

    rate: float  # asked for
    done: float  # answered a second
    p50: float  # seconds
    p99: float


@dataclass
class Arm:
    """One server, and what was measured of it."""

    name: str
    client: Client
    low: float = 0.0  # highest rate known to keep the limit
    high: float = 0.0  # lowest rate known not to
    probes: list[Probe] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # FLOPs of each answer over those of dense
    answers: dict[int, str] = field(default_factory=dict)
    patterns: dict[str, Probe] = field(default_factory=dict)

    async def answer(self, body: bytes) -> tuple[dict[str, str], bytes] | None:
        """Headers and content of an answer; ``None`` if too many wait; RuntimeError if it is another response."""
        status, headers, content = await self.client.ask(body)
        if status in OVERLOADED:
            return None
        if status != 200:
            raise RuntimeError(f"{self.name}: {status} {content!r}")
        return headers, content


def arrivals(pattern: str, rate: float, seconds: float, seed: int) -> np.ndarray:
    """Times of requests, in seconds from the start."""
    random, count = np.random.default_rng(seed), max(1, round(rate * seconds))
    if pattern == "constant":
        return np.arange(count) / rate
    if pattern == "bursts":
        return np.repeat(random.exponential(BURST / rate, math.ceil(count / BURST)).cumsum(), BURST)[:count]
    return random.exponential(1 / rate, count).cumsum()


async def load(arm: Arm, bodies: list[bytes], times: np.ndarray, seed: int) -> Probe:
    """Send requests at given times; it ends early where far too many are under way."""
    random, loop = np.random.default_rng(seed), asyncio.get_running_loop()
    latencies: list[float] = []
    under_way: set[asyncio.Task[None]] = set()
    begun = loop.time() + 0.05

    async def one(row: int, due: float) -> None:
        response = await arm.answer(bodies[row])
        latencies.append(math.inf if response is None else loop.time() - due)
        if response is None:
            return
        headers, content = response
        arm.shares.append(float(headers["x-flops-ratio"]))
        said = json.loads(content)
        said = said[0]["label"] if isinstance(said, list) else said["answer"]
        if arm.answers.setdefault(row, said) != said and arm.name != DIAL:  # which answers at several points
            raise RuntimeError(f"{arm.name}: two answers to one text: {said!r} and {arm.answers[row]!r}")

    rows, overloaded = random.integers(len(bodies), size=len(times)), False
    async with asyncio.TaskGroup() as tasks:  # an error of any of them is raised
        for row, at in zip(rows.tolist(), times.tolist(), strict=True):
            if (wait := begun + at - loop.time()) > 0:
                await asyncio.sleep(wait)
            if overloaded := len(under_way) > BACKLOG:
                break
            task = tasks.create_task(one(row, begun + at))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
    seconds = loop.time() - begun
    p50, p99 = np.quantile(latencies, [0.5, 0.99], method="higher")
    return Probe(len(times) / times[-1], len(latencies) / seconds, p50, math.inf if overloaded else p99)


async def capacity(arm: Arm, bodies: list[bytes], seconds: float) -> float:
    """Requests a second with many clients that wait for their answers."""
    rows, until, count = itertools.cycle(range(len(bodies))), time.monotonic() + seconds, 0

    async def client() -> None:
        nonlocal count
        while time.monotonic() < until:
            await arm.answer(bodies[next(rows)])
            count += 1

    await asyncio.gather(*(client() for _ in range(64)))
    return count / seconds


async def alone(arm: Arm, bodies: list[bytes], seconds: float) -> float:
    """Median latency of one request at a time."""
    until, times = time.monotonic() + seconds, []
    for body in itertools.cycle(bodies):
        started = time.monotonic()
        await arm.answer(body)
        times.append(time.monotonic() - started)
        if times[-1] + started > until:
            return float(np.median(times))
    raise AssertionError("texts never end")


async def measure(arms: list[Arm], bodies: list[bytes], probes: int, seconds: float) -> float:
    """Search the highest rate of each arm, all in turn; returns the limit of p99, in seconds."""
    for arm in arms:
        await capacity(arm, bodies, 1.0)  # warms it up
    limit = TIMES_DENSE * await alone(arms[0], bodies, 3.0)
    for arm in arms:
        arm.high = 1.1 * await capacity(arm, bodies, 3.0)
    for number in range(probes):
        for arm in arms:
            rate = math.sqrt((arm.low or arm.high / 4) * arm.high)
            probe = await load(arm, bodies, arrivals("poisson", rate, seconds, number), number)
            arm.probes.append(probe)
            if probe.p99 <= limit:
                arm.low = probe.rate
            else:
                arm.high = probe.rate
    if not all(arm.low for arm in arms):
        raise RuntimeError(f"no rate tried keeps p99 within {limit:.3f} s; pass more --probes")
    common = 0.8 * arms[0].low
    for pattern in PATTERNS:
        for arm in arms:
            arm.patterns[pattern] = await load(arm, bodies, arrivals(pattern, common, seconds / 2, 99), 99)
    return limit


def table_of(arms: list[Arm], limit: float) -> Table:
    """All results."""
    dense, common = arms[0], arms[0].patterns["poisson"].rate
    title = f"highest rate with p99 within {1000 * limit:.0f} ms; p99 in ms at {common:.0f} requests a second"
    table = Table(title=title)
    for column in ("arm", "FLOPs", "rate", "of dense", "kept", *PATTERNS, "same answers as dense"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in arms:
        share, rows = float(np.mean(arm.shares)), arm.answers.keys() & dense.answers.keys()
        same = np.mean([arm.answers[row] == dense.answers[row] for row in rows])
        gain = arm.low / dense.low
        p99 = [f"{1000 * arm.patterns[pattern].p99:.0f}" for pattern in PATTERNS]
        cells = f"{share:.1%}", f"{arm.low:.0f}", f"{gain:.2f}", f"{gain * share:.2f}", *p99, f"{same:.1%}"
        table.add_row(arm.name, *cells)
    return table


def draw(arms: list[Arm], limit: float, file: Path) -> None:
    """Latency by rate."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm in arms:
        probes = sorted(probe for probe in arm.probes if math.isfinite(probe.p99))
        axes.plot([one.rate for one in probes], [1000 * one.p99 for one in probes], "o-", label=arm.name, markersize=4)
    axes.axhline(1000 * limit, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="requests a second", ylabel="p99 latency, ms", yscale="log")
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Print the table and draw the picture; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of few masks, or what sd-gym export wrote of it")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with the task's fields")
    parser.add_argument("--output", type=Path, default=Path("serving"), help="folder of picture and figures")
    parser.add_argument("--backbone", help="where the backbone is, if not where it was")
    parser.add_argument("--threads", type=int, default=1, help="of each model")
    parser.add_argument("--dial", help="a run on a serving env with this policy")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--probes", type=int, default=6, help="rates that are tried on each arm")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of them")
    arguments = parser.parse_args()
    begun = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with arguments.input.open() as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, arguments.texts)]
    arms, options = [], (arguments.run, arguments.backbone, arguments.threads, rows[:256], arguments.dial)
    for name in dict.fromkeys(["dense", *arguments.arms, *([DIAL] if arguments.dial else [])]):
        arms.append(Arm(name, Client(started(serve_arm, name, *options).recv())))
    bodies = [json.dumps({"inputs": row}).encode() for row in rows]
    limit = asyncio.run(ready_and_measured(arms, bodies, arguments.probes, arguments.seconds))
    console = Console(width=max(120, Console().width))
    console.print(table_of(arms, limit))
    console.print(f"{time.monotonic() - begun:.0f} s")
    draw(arms, limit, arguments.output / "latency.png")
    figures = {arm.name: {"rate": arm.low, "probes": arm.probes, "patterns": arm.patterns} for arm in arms}
    (arguments.output / "serving.json").write_text(json.dumps({"limit": limit, "arms": figures}, indent=1))


async def ready_and_measured(arms: list[Arm], bodies: list[bytes], probes: int, seconds: float) -> float:
    """Wait until all servers are ready, then measure."""
    for arm in arms:
        while (await arm.client.ask(bodies[0]))[0] == 503:
            await asyncio.sleep(0.1)
    return await measure(arms, bodies, probes, seconds)


if __name__ == "__main__":
    main()
