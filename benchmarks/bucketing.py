"""Is it cheaper to run rows that share a decision in passes of their own than to gather rows at every sublayer?

    python benchmarks/bucketing.py

Prints the time of one pass for each group of equal decisions, over the time of the single mixed pass that the
switchboard makes; above 1, the single pass is the better plan. Random weights, 64 tokens, keep rate one half.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from switching import WARM_UP, compare, make_model

from sd_gym.switch import Switchboard

CASES = (
    ("bert", 128, 32),
    ("bert", 128, 128),
    ("bert", 512, 8),
    ("bert", 512, 32),
    ("llama", 512, 8),
    ("llama", 512, 32),
)
GROUPS = (2, 4, 8)
LAYERS, TOKENS = 3, 64


@torch.inference_mode()
def measure(architecture: str, width: int, batch: int, groups: int, pairs: int) -> float:
    """Median over pairs of the time of the grouped passes over that of the mixed pass."""
    model = make_model(architecture, width, LAYERS)
    board = Switchboard(model)
    ids = torch.randint(3, 1000, (batch, TOKENS))
    random = np.random.default_rng(0)
    group = random.integers(groups, size=batch)
    skip = (random.random((groups, len(board))) < 0.5)[group]
    parts = [np.nonzero(group == number)[0] for number in np.unique(group)]

    def mixed() -> None:
        with board.decide(skip):
            model(input_ids=ids)

    def grouped() -> None:
        outputs = []
        for rows in parts:
            with board.decide(skip[rows]):
                outputs.append(model(input_ids=ids[rows]).logits)
        torch.cat(outputs)[torch.from_numpy(np.argsort(np.concatenate(parts)))]

    return statistics.median([compare(mixed, grouped) for _ in range(pairs + WARM_UP)][WARM_UP:])


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    arguments = parser.parse_args()
    table = Table(title="time of one pass a decision over time of one mixed pass")
    for column in ("architecture", "width", "batch", *(f"{groups} decisions" for groups in GROUPS)):
        table.add_column(column, justify="right")
    for case in CASES:
        table.add_row(*map(str, case), *(f"{measure(*case, groups, arguments.pairs):.2f}" for groups in GROUPS))
    Console().print(table)


if __name__ == "__main__":
    main()
