"""What can be had on a table, exactly: mean loss of quality against mean FLOPs, of masks and of the best decisions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.table import TableSplit

Array = NDArray
ROWS = 256  # that are looked at together under all masks
# How many FLOPs ratios a lost answer costs; up to 1 they decide between any two masks of an instance.
MULTIPLIERS = np.concatenate([np.linspace(0, 1, 51), np.geomspace(1, 300, 40)[1:]])


class Curve(NamedTuple):
    """Points of mean loss (quality_ref - quality) and mean FLOPs ratio, from the least loss to the fewest FLOPs."""

    loss: Array  # [points], ascending
    flops: Array  # [points], descending; convex
    number: Array  # [points], int64: which of the points or masks it was made of

    def at(self, loss: float) -> float:
        """The fewest FLOPs at a mean loss, of a coin between two points; ``ValueError`` if none loses so little."""
        if loss < self.loss[0]:
            raise ValueError(f"expected a loss of at least {self.loss[0]:.4f}, got {loss:.4f}")
        return float(np.interp(loss, self.loss, self.flops))


def lower_hull(loss: Array, flops: Array) -> Curve:
    """The lower convex hull of points ``[points]`` of mean loss and FLOPs (Andrew's monotone chain, 1979)."""
    chain: list[int] = []
    for number in np.lexsort((flops, loss)).tolist():
        if chain and flops[number] >= flops[chain[-1]]:
            continue
        while len(chain) > 1:
            (before_loss, before), (last_loss, last) = ((loss[one], flops[one]) for one in chain[-2:])
            if (last - before) * (loss[number] - before_loss) < (flops[number] - before) * (last_loss - before_loss):
                break
            chain.pop()
        chain.append(number)
    return Curve(loss[chain], flops[chain], np.array(chain))


def outcomes_of_all(split: TableSplit) -> Iterator[tuple[Array, Array, Array]]:
    """Rows, and their losses and FLOPs ratios under all masks, ``[rows, masks]``; some rows after the other."""
    for start in range(0, len(split), ROWS):
        rows = np.arange(start, min(start + ROWS, len(split)))
        quality = split.scoring.of_masks(rows)
        yield rows, quality[:, :1] - quality, split.costs.of_masks(rows)


def hull(split: TableSplit) -> Curve:
    """The lower hull of all masks and dense on a split: what one mask for all, or a coin between two, can reach.

    ``number`` is that of the mask. It is known in hindsight, so it is hard to beat: a policy that is below it uses its
    inputs.
    """
    sums = [np.stack([loss.sum(axis=0), flops.sum(axis=0)]) for _, loss, flops in outcomes_of_all(split)]
    return lower_hull(*np.sum(sums, axis=0) / len(split))


def hull_at(split: TableSplit, loss: float) -> float:
    """FLOPs ratio of the hull at a mean loss; ``ValueError`` if no mask loses so little."""
    return hull(split).at(loss)


def oracle(split: TableSplit) -> Curve:
    """The best decision of each instance at each of ``MULTIPLIERS``, in knowledge of its outcomes: a bound.

    A lucky wrong way counts as right.
    """
    sums = np.zeros((2, len(MULTIPLIERS)))
    for rows, loss, flops in outcomes_of_all(split):
        at = np.arange(len(rows))
        for column, multiplier in enumerate(MULTIPLIERS):
            best = (flops + multiplier * loss).argmin(axis=1)
            sums[:, column] += loss[at, best].sum(), flops[at, best].sum()
    return lower_hull(*sums / len(split))
