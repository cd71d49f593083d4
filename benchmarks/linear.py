"""What fewer rows save in a single linear: the bound of what skipping can save when a batch decodes token by token.

    python benchmarks/linear.py

At a few rows, a linear's time goes into reading its weights, which every batch must, however few of its rows run.
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

WIDTH, LAYERS, ROUNDS = 512, 24, 25  # more weights than the caches hold
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@torch.inference_mode()
def main() -> None:
    """Print microseconds of a linear 512 to 2048, by rows, and what half the rows take of it."""
    linears = [torch.nn.Linear(WIDTH, 4 * WIDTH) for _ in range(LAYERS)]
    times: dict[int, float] = {}
    for rows in ROWS:
        values, inputs = [], torch.randn(rows, WIDTH)
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for linear in linears:
                linear(inputs)
            values.append((time.perf_counter() - started) / LAYERS)
        times[rows] = statistics.median(values)
    table = Table(title=f"a linear {WIDTH} to {4 * WIDTH}")
    for column in ("rows", "microseconds", "half the rows take", "promise that can be kept"):
        table.add_column(column, justify="right")
    for rows in ROWS:
        half = times.get(rows // 2)
        shares = ("", "") if half is None else (f"{half / times[rows]:.0%}", f"{0.5 * times[rows] / half:.2f}")
        table.add_row(str(rows), f"{1e6 * times[rows]:.0f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
