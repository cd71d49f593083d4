"""Does the clock show what the FLOPs promise? Time ratio beside FLOPs ratio, dense timed in the same run.

    python benchmarks/switching.py
    python benchmarks/switching.py --backbone runs/minilm-sst2 --dataset path/to/sst2

The first prints the bundled summarizer, the second any prepared classifier. Random decisions at several keep rates, and
nothing skipped; the median over batches of mixed lengths. promise kept = FLOPs ratio / time ratio; 1 = all of it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import sd_gym  # noqa: F401  (registers the ids)

KEEP_RATES = (1.0, 0.8, 0.6, 0.4, 0.2)


@torch.inference_mode()
def measure(core, keep_rate: float, batch_size: int, batches: int) -> tuple[float, float]:
    """(FLOPs ratio, time ratio) of random decisions on random batches of the test split."""
    split, backbone = core.split("test"), core.backbone
    random = np.random.default_rng(0)
    ratios, used, dense_flops = [], 0.0, 0.0
    for number in range(batches + 3):
        rows = random.integers(len(split), size=batch_size)
        inputs = split.encoded.batch(rows, backbone.model.device)
        skip = (random.random((batch_size, core.n_switches)) >= keep_rate).astype(np.int64)
        started = time.perf_counter()
        backbone.logits(inputs)
        middle = time.perf_counter()
        with backbone.board.decide(skip):
            backbone.logits(inputs)
        ended = time.perf_counter()
        if number < 3:
            continue  # warm-up
        ratios.append((ended - middle) / (middle - started))
        # Every row is computed at the batch's padded length, dense and switched alike.
        lengths = [np.full(batch_size, inputs["input_ids"].shape[1])]
        if backbone.generates:
            lengths.append(np.full(batch_size, inputs["labels"].shape[1]))
        always, switched = backbone.flops.costs(*lengths)
        used += float((always + (switched * (1 - skip)).sum(axis=1)).sum())
        dense_flops += float((always + switched.sum(axis=1)).sum())
    return used / dense_flops, statistics.median(ratios)


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", help="folder of a prepared classifier; without it, the bundled summarizer")
    parser.add_argument("--dataset", help="its data set: JSONL file or folder")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=30)
    arguments = parser.parse_args()
    env_id, settings = "SD/Summarization-Mini-v0", {"train_size": 500, "test_size": 1000}
    if arguments.backbone:
        env_id = "SD/Classification-Custom-v0"
        settings = {"backbone": arguments.backbone, "dataset": arguments.dataset, "train_size": 500}
    core = gym.make(env_id, **settings).unwrapped.core
    table = Table(title=f"{arguments.backbone or env_id}, batch {arguments.batch_size}")
    for column in ("keep rate", "FLOPs ratio", "time ratio", "promise kept"):
        table.add_column(column, justify="right")
    for keep_rate in KEEP_RATES:
        flops, clock = measure(core, keep_rate, arguments.batch_size, arguments.batches)
        table.add_row(f"{keep_rate:.1f}", f"{flops:.3f}", f"{clock:.3f}", f"{flops / clock:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
