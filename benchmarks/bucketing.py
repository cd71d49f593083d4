"""Is it cheaper to run rows that share a decision in passes of their own than to gather rows at every sublayer?

    python benchmarks/bucketing.py
    python benchmarks/bucketing.py --generate    # 24 tokens behind each input
    python benchmarks/bucketing.py --waiting 64  # so many inputs wait, 8 at a time generate

Prints the times of two plans over that of the single mixed pass: a pass for each decision, and what
``sd_gym.switch.passes`` chooses, the choosing included, with its number of passes. Above 1, the single pass is better.
Random weights, 64 tokens, keep rate one half; each row takes one of 2, 4 or 8 decisions.

With ``--waiting`` it prints what ``generate()`` keeps of the promise (FLOPs over processor time, dense in the same run)
where batches are taken in the order of the inputs, and where ``passes(..., most=8)`` puts together those that agree; of
eight decisions, some are taken more often, as in ``switching.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from switching import WARM_UP, compare, decisions, make_model

from sd_gym.switch import FlopsModel, Switchboard, passes

CASES = (
    ("bert", 128, 32),
    ("bert", 128, 128),
    ("bert", 512, 8),
    ("bert", 512, 32),
    ("llama", 512, 8),
    ("llama", 512, 32),
)
GROUPS = (2, 4, 8)
GENERATING = (("llama", 512, 8), ("llama", 512, 32), ("bart", 512, 8), ("bart", 512, 32))
LAYERS, TOKENS, STEPS = 3, 64, 24
GENERATED = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
TOGETHER = 8  # inputs of a batch, where more are waiting


@torch.inference_mode()
def measure(architecture: str, width: int, batch: int, groups: int, pairs: int, steps: int) -> str:
    """Times of one pass a decision and of the chosen passes over that of the mixed pass, medians over pairs."""
    model = make_model(architecture, width, LAYERS)
    board = Switchboard(model)
    ids, lengths = torch.randint(3, 1000, (batch, TOKENS)), np.full(batch, TOKENS)
    random = np.random.default_rng(0)
    group = random.integers(groups, size=batch)
    skip = (random.random((groups, len(board))) < 0.5)[group]

    def call(part: torch.Tensor) -> torch.Tensor:
        if not steps:
            return model(input_ids=part).logits
        return model.generate(input_ids=part, attention_mask=torch.ones_like(part), **GENERATED)

    def run(parts: list[NDArray]) -> None:
        outputs = []
        for rows in parts:
            with board.decide(skip[rows]):
                outputs.append(call(ids[rows]))
        torch.cat(outputs)[torch.from_numpy(np.argsort(np.concatenate(parts)))]

    def mixed() -> None:
        with board.decide(skip):
            call(ids)

    def by_decision() -> None:
        run([np.nonzero(group == number)[0] for number in np.unique(group)])

    def chosen() -> None:
        run(passes(skip, lengths, width, steps))

    ratios = [(compare(mixed, by_decision), compare(mixed, chosen)) for _ in range(pairs + WARM_UP)][WARM_UP:]
    own, best = map(statistics.median, zip(*ratios, strict=True))
    return f"{own:.2f} / {best:.2f} ({len(passes(skip, lengths, width, steps))})"


@torch.inference_mode()
def measure_waiting(architecture: str, width: int, inputs: int, rounds: int) -> list[str]:
    """What is kept, of batches in the order of the inputs and of those that agree; before each, sublayers that run."""
    model = make_model(architecture, width, LAYERS)
    board = Switchboard(model)
    ids, lengths = torch.randint(3, 1000, (inputs, TOKENS)), np.full(inputs, TOKENS)
    always, costs = FlopsModel(board).generation_costs(lengths, np.full(inputs, STEPS))
    random, found = np.random.default_rng(0), []

    def seconds(parts: list[NDArray], skip: NDArray) -> float:
        started = time.process_time()
        for rows in parts:
            part = ids[torch.from_numpy(rows)]
            with board.decide(skip[rows]):
                model.generate(input_ids=part, attention_mask=torch.ones_like(part), **GENERATED)
        return time.process_time() - started

    in_order = np.split(np.arange(inputs), range(TOGETHER, inputs, TOGETHER))
    for _ in range(rounds + 1):
        skip = decisions(random, inputs, len(board), "few").astype(bool)
        dense = seconds(in_order, np.zeros_like(skip))
        flops = (always + (costs * ~skip).sum(axis=1)).sum() / (always + costs.sum(axis=1)).sum()
        for parts in (in_order, passes(skip, lengths, width, STEPS, TOGETHER)):
            runs = statistics.fmean((~skip[rows]).any(axis=0).mean() for rows in parts)
            found.append((flops, runs, flops * dense / seconds(parts, skip)))
    found = np.array(found).reshape(rounds + 1, 2, 3)[1:]  # the first round warms up
    cells = [f"{runs:.0%}, {kept:.2f}" for runs, kept in np.median(found, axis=0)[:, 1:]]
    return [architecture, str(width), f"{found[:, :, 0].mean():.0%}", *cells]


def waiting_table(inputs: int, rounds: int) -> Table:
    """Batches of inputs that wait."""
    table = Table(title=f"generate(), {TOGETHER} of {inputs} inputs at a time: sublayers that run, promise kept")
    for column in ("architecture", "width", "FLOPs", "in order", "those that agree"):
        table.add_column(column, justify="right")
    for architecture, width, batch in GENERATING:
        if batch == TOGETHER:
            table.add_row(*measure_waiting(architecture, width, inputs, rounds))
    return table


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--generate", action="store_true", help="time generate() instead of forward passes")
    parser.add_argument("--waiting", type=int, metavar="INPUTS", help="inputs that wait to generate, 8 at a time")
    arguments = parser.parse_args()
    if arguments.waiting:
        Console().print(waiting_table(arguments.waiting, arguments.pairs))
        return
    cases, steps = (GENERATING, STEPS) if arguments.generate else (CASES, 0)
    table = Table(title="one pass a decision / chosen passes (their number), over one mixed pass")
    for column in ("architecture", "width", "batch", *(f"{groups} decisions" for groups in GROUPS)):
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(*map(str, case), *(measure(*case, groups, arguments.pairs, steps) for groups in GROUPS))
    Console().print(table)


if __name__ == "__main__":
    main()
