"""Where the time goes: milliseconds of each part of the work, dense and switched.

    python benchmarks/profile_switching.py
    python benchmarks/profile_switching.py --phase prefill --architectures bert llama --batch-sizes 8 32

The phases of switching.py, random weights, half of all switches kept at random. A timer looks every half millisecond at
which function is running; what it runs in C (a matrix product, say) counts for the function that called it. Unlike a
tracing profiler that hardly slows anything down.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from switching import decisions, make_model, phases

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


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["llama", "mbart"])
    parser.add_argument("--phase", choices=["prefill", "teacher-forced", "decode"], default="decode")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
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
