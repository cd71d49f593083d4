"""What a deployment gets of a trained policy: eager, as a bank, compiled, and as ONNX graphs; each over its own dense.

    sd-gym reduce runs/reviews --codebook 8 --output runs/reviews-8
    OMP_NUM_THREADS=1 python benchmarks/deployment.py runs/reviews-8 --compile

All answer the same texts of the env's test split (and then of its training split), from text to answer, tokenising and
deciding included, and take turns. "time" is the median over dense in eager, "own dense" over dense of the same engine;
promise kept = FLOPs / own dense; 1 = all of it. "agree" is how many answers are those of dense in eager.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

import sd_gym
from sd_gym.envs.config import make_config
from sd_gym.envs.shared import shared_core
from sd_gym.inference.answer import Answer
from sd_gym.inference.onnx import OnnxModel
from sd_gym.inference.texts import SkippingModel
from sd_gym.policy.artefact import SkipPolicy

WARM_UP = 2


class Contestant(NamedTuple):
    """One way to answer."""

    name: str
    answers: Callable[[list], list[Answer]]
    dense: str  # name of the dense of its engine


class Static(OnnxModel):
    """An export that answers everything under the mask that most texts have."""

    number = 0

    def _decided(self, rows: list, length: np.ndarray) -> np.ndarray:
        return np.full(len(rows), self.number)

    def own_flops(self, length: np.ndarray) -> np.ndarray:
        """None: nobody decides."""
        return np.zeros(len(length))


def contestants(run: Path, texts: list, folder: Path, *, threads: int, compiles: bool) -> list[Contestant]:
    """All ways to answer."""
    policy, options = SkipPolicy.from_pretrained(run), onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    bank, attached = sd_gym.load(policy), sd_gym.load(policy)
    vars(attached)["_bank"] = None
    found = [
        Contestant("dense, eager", lambda inputs: attached.answers(inputs, dense=True), "dense, eager"),
        Contestant("policy, switchboard", attached.answers, "dense, eager"),
        Contestant("policy, bank", bank.answers, "dense, eager"),
    ]
    if compiles:
        compiled: SkippingModel = sd_gym.load(policy, compile=True)
        found += [
            Contestant("dense, compiled", lambda inputs: compiled.answers(inputs, dense=True), "dense, compiled"),
            Contestant("policy, compiled", compiled.answers, "dense, compiled"),
        ]
    for name, int8 in (("ONNX", False), ("ONNX int8", True)):
        sd_gym.export(policy, folder / name, masks=64, int8=int8)
        model = sd_gym.onnx.load(folder / name, session_options=options)
        static = Static(folder / name, session_options=options)
        masks, count = np.unique([answer.skip for answer in model(texts)], axis=0, return_counts=True)
        static.number = int(np.flatnonzero((model.masks == masks[count.argmax()]).all(axis=1))[0])
        found += [
            Contestant(
                f"dense, {name}", lambda inputs, model=model: model.answers(inputs, dense=True), f"dense, {name}"
            ),
            Contestant(f"one mask, {name}", static.answers, f"dense, {name}"),
            Contestant(f"policy, {name}", model.answers, f"dense, {name}"),
        ]
    return found


def add_rows(table: Table, ways: list[Contestant], texts: list, size: int, rounds: int) -> None:
    """Measure batches of a size, on all ways in turn."""
    random, times = np.random.default_rng(0), {way.name: list[float]() for way in ways}
    flops, agree = ({way.name: list[float]() for way in ways} for _ in range(2))
    for number in range(rounds + WARM_UP):
        batch = [texts[row] for row in random.permutation(len(texts))[:size]]
        wanted: list[str] = []
        for way in ways:
            started = time.perf_counter()
            answers = way.answers(batch)
            seconds = time.perf_counter() - started
            wanted = wanted or [one.answer for one in answers]
            if number >= WARM_UP:
                times[way.name].append(seconds)
                flops[way.name] += [one.flops_ratio for one in answers]
                agree[way.name] += [float(one.answer == other) for one, other in zip(answers, wanted, strict=True)]
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    for way in ways:
        share = statistics.fmean(flops[way.name])
        over, own = (middle[way.name] / middle[dense] for dense in ("dense, eager", way.dense))
        cells = (
            f"{share:.1%}",
            f"{over:.1%}",
            f"{own:.1%}",
            f"{share / own:.2f}",
            f"{statistics.fmean(agree[way.name]):.1%}",
        )
        table.add_row(f"{size:,}", way.name, f"{1000 * middle[way.name]:.2f} ms", *cells, end_section=way is ways[-1])


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of few masks, of an encoder that classifies, scores or extracts")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=40, help="timed batches of each size")
    parser.add_argument("--texts", type=int, default=2000, help="texts of the file, which is answered three times")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    env = SkipPolicy.from_pretrained(arguments.run).card["env"]
    core = shared_core(make_config(env, env["id"]))
    instances = chain(core.split("test").instances, core.split("train").instances)
    texts = [
        one.source if one.source_pair is None else (one.source, one.source_pair)
        for one in islice(instances, arguments.texts)
    ]
    table = Table(title=f"{arguments.run.name}, {arguments.threads} thread(s)")
    for column in ("rows", "who answers", "median", "FLOPs", "time", "own dense", "kept", "agree"):
        table.add_column(column, justify="left" if column == "who answers" else "right")
    with TemporaryDirectory() as folder:
        options = {"threads": arguments.threads, "compiles": arguments.compile}
        ways = contestants(arguments.run, texts, Path(folder), **options)
        for size in arguments.batch_sizes:
            add_rows(table, ways, texts, size, arguments.rounds)
        add_rows(table, ways, texts, len(texts), 3)
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
