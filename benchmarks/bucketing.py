"""Is it cheaper to run rows that share a decision in passes of their own than to gather rows at every sublayer?

    python benchmarks/bucketing.py
    python benchmarks/bucketing.py --generate    # 24 tokens behind each input

Prints the times of two plans over that of the single mixed pass: a pass for each decision, and what
``sd_gym.switch.passes`` chooses, the choosing included, with its number of passes. Above 1, the single pass is better.
Random weights, 64 tokens, keep rate one half; each row takes one of 2, 4 or 8 decisions.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from switching import WARM_UP, compare, make_model

from sd_gym.switch import Switchboard, passes

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
        settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
        return model.generate(input_ids=part, attention_mask=torch.ones_like(part), **settings)

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


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--generate", action="store_true", help="time generate() instead of forward passes")
    arguments = parser.parse_args()
    cases, steps = (GENERATING, STEPS) if arguments.generate else (CASES, 0)
    table = Table(title="one pass a decision / chosen passes (their number), over one mixed pass")
    for column in ("architecture", "width", "batch", *(f"{groups} decisions" for groups in GROUPS)):
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(*map(str, case), *(measure(*case, groups, arguments.pairs, steps) for groups in GROUPS))
    Console().print(table)


if __name__ == "__main__":
    main()
