"""Where the time goes: milliseconds of each part of the work, dense and switched.

    python benchmarks/profile_switching.py
    python benchmarks/profile_switching.py --phase prefill --architectures bert llama --batch-sizes 8 32
    python benchmarks/profile_switching.py --env SD/Summarization-Mini-v0 --batch-sizes 1 8

The phases of switching.py, random weights, half of all switches kept at random. A timer looks every half millisecond at
which function is running; what it runs in C (a matrix product, say) counts for the function that called it. Unlike a
tracing profiler that hardly slows anything down.

With ``--env``: an env's own backbone and texts instead, and what each step from tokenised texts to logits takes over
the dense backbone, in the same round: observing, deciding, entering and leaving the block, the pass, all of it, and the
pass with everything skipped. The policy has random weights and decides by a random draw that keeps about ``--flops`` of
the FLOPs, another one each round.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from switching import decisions, make_model, phases

import sd_gym  # noqa: F401  (registers the ids)
from sd_gym.envs.core import Core
from sd_gym.envs.split import Split
from sd_gym.policy import DecisionPolicy
from sd_gym.switch import Switchboard

INTERVAL = 0.0005  # seconds
PARTS = {  # by what the file's path holds; the first that fits
    "switches": ("sd_gym/switch/",),
    "linears": ("torch/nn/modules/linear.py", "transformers/pytorch_utils.py"),
    "attention products": ("transformers/integrations/",),
    "key-value cache": ("transformers/cache_utils.py",),
    "norms, rotary, residual sums": ("transformers/models/", "modules/normalization.py", "torch/nn/functional"),
    "calling modules": ("torch/nn/modules/module.py",),
    "masks, activations, the rest": ("",),
}


def part_of(frame: FrameType) -> str:
    """The part of the work that a running function belongs to."""
    path = frame.f_code.co_filename
    return next(part for part, marks in PARTS.items() if any(mark in path for mark in marks))


def sampled(run: Callable[[], object]) -> Counter[str]:
    """Milliseconds of each part of one run."""
    samples: Counter[str] = Counter()

    def look(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is not look.__code__:
            samples[part_of(frame)] += 1

    before = signal.signal(signal.SIGALRM, look)
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)
    try:
        run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.perf_counter() - started
        signal.signal(signal.SIGALRM, before)
    share = 1000 * seconds / samples.total()  # a signal that comes while one is handled is lost
    return Counter({part: count * share for part, count in samples.items()})


@torch.inference_mode()
def profile(architecture: str, batch: int, arguments: argparse.Namespace) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds of each part of one dense and one switched run of the phase: means over the rounds."""
    model, random = make_model(architecture, arguments.width, arguments.layers), np.random.default_rng(0)
    board = Switchboard(model)
    run, (_, switched) = phases(board, batch)[arguments.phase]
    run()
    totals: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for _ in range(arguments.rounds):
        totals[0].update(sampled(run))
        with board.decide(decisions(random, batch, switched.shape[1], arguments.keep_rate)):
            totals[1].update(sampled(run))
    board.remove()
    return tuple(Counter({part: value / arguments.rounds for part, value in total.items()}) for total in totals)


@torch.inference_mode()
def steps(core: Core, batch: int, flops: float, rounds: int) -> dict[str, float]:
    """Times of the steps over the dense pass, and the FLOPs ratio: medians over rounds."""
    split, random = core.split("test"), np.random.default_rng(0)
    policy = DecisionPolicy(core.observation.space.shape[0], core.nvec.tolist(), core.backbone.board.names).eval()
    found: list[dict[str, float]] = []
    for _ in range(rounds + 5):
        rows = random.choice(len(split), size=batch, replace=False)
        found.append(_round(core, split, rows, policy.with_decision(_drawn(core, split, rows, flops, random))))
    return {step: statistics.median(one[step] for one in found[5:]) for step in found[0]}


def _drawn(core: Core, split: Split, rows: NDArray, flops: float, random: np.random.Generator) -> NDArray:
    """A decision ``[switches + 1]`` that keeps about so much of these rows' FLOPs."""
    drawn = np.zeros((50, len(core.nvec)), dtype=np.int64)
    drawn[:, :-1] = random.random((50, core.n_switches)) < 1 - flops
    ratios = [split.costs.flops_ratio(rows, np.repeat(one[None], len(rows), axis=0)).mean() for one in drawn]
    return drawn[np.abs(np.array(ratios) - flops).argmin()]


def _round(core: Core, split: Split, rows: NDArray, policy: DecisionPolicy) -> dict[str, float]:
    board, everything = core.backbone.board, np.arange(len(rows))
    observations = core.observe(split, rows)
    chosen = policy.decide(observations)
    inputs, observed, unseen = split.passes.inputs(rows), split.unseen(rows), split.unseen(rows)
    skipped = np.ones_like(chosen[:, :-1])

    def enter() -> None:
        with board.decide(chosen[:, :-1]):
            pass

    def run(skip: NDArray) -> None:
        with board.decide(skip):
            core.backbone.logits(inputs)

    parts: dict[str, Callable[[], object]] = {
        "dense": lambda: core.backbone.logits(split.passes.inputs(rows)),
        "observing": lambda: core.observe(observed, everything),
        "deciding": lambda: policy.decide(observations),
        "entering and leaving": enter,
        "entering, passing, leaving": lambda: run(chosen[:, :-1]),
        "all, from texts to logits": lambda: list(core.decided_logits(unseen, everything, policy.decide)),
        "everything skipped": lambda: run(skipped),
    }
    seconds = {}
    for name, part in parts.items():
        started = time.perf_counter()
        part()
        seconds[name] = time.perf_counter() - started
    ratios = {name: value / seconds["dense"] for name, value in seconds.items()}
    return {**ratios, "FLOPs": split.costs.flops(rows, chosen).sum() / split.costs.dense_flops(rows).sum()}


def print_steps(arguments: argparse.Namespace) -> None:
    """The table of an env's backbone."""
    core = gym.make(arguments.env).unwrapped.core
    columns = [steps(core, batch, arguments.flops, 20 * arguments.rounds) for batch in arguments.batch_sizes]
    table = Table(title=f"{arguments.env}: time over the dense backbone")
    table.add_column("step")
    for batch in arguments.batch_sizes:
        table.add_column(f"batch {batch}", justify="right")
    for step in columns[0]:
        table.add_row(step, *(f"{column[step]:.1%}" for column in columns))
    Console().print(table)


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["llama", "mbart"])
    parser.add_argument("--phase", choices=["prefill", "teacher-forced", "decode"], default="decode")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=10, help="with --env, twenty times as many")
    parser.add_argument("--env", help="an env's id, instead of random weights")
    parser.add_argument("--flops", type=float, default=0.3, help="with --env, what is kept of the FLOPs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.env:
        print_steps(arguments)
        return
    table = Table(title=f"milliseconds of {arguments.phase}, dense / keep rate {arguments.keep_rate}")
    table.add_column("part")
    columns = []
    for architecture in arguments.architectures:
        for batch in arguments.batch_sizes:
            table.add_column(f"{architecture}, batch {batch}", justify="right")
            columns.append(profile(architecture, batch, arguments))
    for part in PARTS:
        table.add_row(part, *(f"{dense[part]:.0f} / {switched[part]:.0f}" for dense, switched in columns))
    table.add_section()
    table.add_row("all", *(f"{dense.total():.0f} / {switched.total():.0f}" for dense, switched in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
