"""Simulates the guarantee of selection: how often it takes a point that truly loses epsilon or more, and what it saves.

    python benchmarks/guarantee.py

Thirty operating points skip more and more and lose more and more; one of them loses exactly epsilon, and later ones
more. Noisy policy rows order them, and the selection rows test them in that order. A false selection is one of a point
that truly loses epsilon or more; its rate may be at most one minus the confidence. Two kinds of rows are simulated:
``nested``, where what one point loses the next ones lose too, and ``alone``, where each point draws its own rows.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.runs.guarantee import sequence
from sd_gym.agents.runs.verdict import Verdict, verdict

EPSILON, CONFIDENCE = 0.01, 0.95
POLICY_ROWS = 500
FIRST_FALSE = 20  # the point that loses exactly epsilon


class Rates(NamedTuple):
    """Of simulated selections."""

    false: float  # how often a point was selected that loses epsilon or more
    flops: float  # mean FLOPs of what was selected, over dense FLOPs
    best: float  # FLOPs of the boldest point that truly loses less than epsilon


def true_losses(points: int = 30) -> NDArray:
    """From nothing to epsilon at ``FIRST_FALSE``, and on to four times as much, ``[points]``."""
    below = EPSILON * (np.arange(FIRST_FALSE + 1) / FIRST_FALSE) ** 2
    return np.r_[below, np.linspace(EPSILON, 4 * EPSILON, points - FIRST_FALSE)[1:]]


def false_selections(
    n: int, disagreement: float, *, nested: bool = True, simulations: int = 1000, seed: int = 0
) -> Rates:
    """Simulate selections on ``n`` rows, where answers at the point of epsilon change on a share of them."""
    random, losses = np.random.default_rng(seed), true_losses()
    flops = np.linspace(1, 0.1, len(losses) + 1)[1:]
    changed = np.maximum(losses, disagreement * np.minimum(1, losses / EPSILON))
    worse, better = (changed + losses) / 2, (changed - losses) / 2  # shares of rows, at each point
    chosen = []

    def outcomes(rows: int) -> NDArray:
        """Losses ``[points, rows]``: 1 where an answer is lost, -1 where one is gained."""
        drawn = random.random((1 if nested else len(losses), rows))
        return (drawn < worse[:, None]).astype(float) - (drawn > 1 - better[:, None])

    for _ in range(simulations):
        order, tests, last = sequence(flops, outcomes(POLICY_ROWS), np.arange(len(flops))), outcomes(n), -1
        for number in order:
            if not _kept(n, int((tests[number] > 0).sum()), int((tests[number] < 0).sum())):
                break
            last = number
        chosen.append(last)
    picked = np.array(chosen)
    spent = np.where(picked < 0, 1, flops[picked])
    return Rates(float((picked >= FIRST_FALSE).mean()), float(spent.mean()), float(flops[FIRST_FALSE - 1]))


@cache
def _kept(n: int, lost: int, gained: int) -> bool:
    quality, quality_ref = np.ones(n), np.ones(n)
    quality[:lost] = 0
    quality_ref[n - gained :] = 0
    return verdict(quality, quality_ref, EPSILON, CONFIDENCE) == Verdict.KEPT


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=10_000)
    simulations = parser.parse_args().simulations
    error = np.sqrt((1 - CONFIDENCE) * CONFIDENCE / simulations)
    print(f"False selections, at most {1 - CONFIDENCE:.0%} (standard error {error:.1%}); mean FLOPs; best FLOPs")
    for rows in ("nested", "alone"):
        for n in (300, 1000, 2000, 5000):
            for disagreement in (0.01, 0.03, 0.1):
                rates = false_selections(n, disagreement, nested=rows == "nested", simulations=simulations)
                print(f"{rows:7} n {n:5} disagreement {disagreement:4.0%}: ", end="")
                print(f"{rates.false:5.1%}  {rates.flops:5.1%}  {rates.best:5.1%}", flush=True)


if __name__ == "__main__":
    main()
