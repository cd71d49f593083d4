"""Exact results on a table: the hull of all masks, and the best decisions.

Loss is the mean of quality_ref - quality, FLOPs the mean of flops_ratio.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.envs.table import TableSplit
from sd_gym.files import read_json
from sd_gym.objectives import Objective

REFERENCES = "references.json"  # in the folder of a table
ROWS = 256  # rows per batch under all masks
# Prices of a lost answer, in FLOPs ratios; those up to 1 decide between any two masks of an instance.
MULTIPLIERS = np.concatenate([np.linspace(0, 1, 51), np.geomspace(1, 300, 40)[1:]])


class Curve(NamedTuple):
    """Points of loss and FLOPs, from the least loss to the fewest FLOPs."""

    loss: Array  # [points], ascending
    flops: Array  # [points], descending; convex
    number: Array  # [points], int64: index of each point in the input

    def at(self, loss: float) -> float:
        """The fewest FLOPs at a loss, by a random mixture of two points; ``ValueError`` if no point loses so little."""
        if loss < self.loss[0]:
            raise ValueError(f"expected a loss of at least {self.loss[0]:.4f}, got {loss:.4f}")
        return float(np.interp(loss, self.loss, self.flops))


def lower_hull(loss: Array, flops: Array) -> Curve:
    """The lower convex hull of points ``[points]`` of loss and FLOPs (Andrew's monotone chain, 1979)."""
    chain: list[int] = []
    for number in np.lexsort((flops, loss)).tolist():
        if chain and flops[number] >= flops[chain[-1]]:
            continue
        while len(chain) > 1:
            (before_loss, before), (last_loss, last) = ((loss[point], flops[point]) for point in chain[-2:])
            if (last - before) * (loss[number] - before_loss) < (flops[number] - before) * (last_loss - before_loss):
                break
            chain.pop()
        chain.append(number)
    return Curve(loss[chain], flops[chain], np.array(chain))


def outcomes_of_all(split: TableSplit) -> Iterator[tuple[Array, Array, Array]]:
    """Rows, and their losses and FLOPs ratios under all masks, ``[rows, masks]``, batch by batch."""
    return ((rows, quality[:, :1] - quality, flops) for rows, quality, flops in _batches(split))


def _batches(split: TableSplit) -> Iterator[tuple[Array, Array, Array]]:
    """Rows, and their qualities and FLOPs ratios under all masks, ``[rows, masks]``; the first mask is dense."""
    for start in range(0, len(split), ROWS):
        rows = np.arange(start, min(start + ROWS, len(split)))
        yield rows, split.scoring.of_masks(rows), split.costs.of_masks(rows)


def hull(split: TableSplit) -> Curve:
    """The lower hull of all masks on a split: what one mask for all inputs, or a random mixture of two, can reach.

    ``number`` is the index of the mask. The hull is chosen in hindsight, so only a policy that uses its inputs can beat
    it.
    """
    sums = [np.stack([loss.sum(axis=0), flops.sum(axis=0)]) for _, loss, flops in outcomes_of_all(split)]
    return lower_hull(*np.sum(sums, axis=0) / len(split))


def oracle(split: TableSplit, expected: Callable[[Array], Array] | None = None) -> Curve:
    """The best decision of each instance, given its outcomes, at each of ``MULTIPLIERS``: an upper bound.

    Answers that a mask gets right by luck count as right. ``expected`` maps rows ``[n]`` to losses ``[n, masks]``, by
    which masks are then chosen instead.
    """
    sums = np.zeros((2, len(MULTIPLIERS)))
    for rows, loss, flops in outcomes_of_all(split):
        known, at = loss if expected is None else expected(rows), np.arange(len(rows))
        for column, multiplier in enumerate(MULTIPLIERS):
            best = (flops + multiplier * known).argmin(axis=1)
            sums[:, column] += loss[at, best].sum(), flops[at, best].sum()
    return lower_hull(*sums / len(split))


def normalised_score(folder: Path, loss: float, flops: float) -> float | None:
    """The score of a result on a table's test split: 0 on its hull, 1 where full information is.

    Both are read at the result's ``loss`` (at 0 if it is negative) from the table's ``references.json``. ``None`` if
    the table has no references, or full information is not better than the hull there.
    """
    if not (folder / REFERENCES).is_file():
        return None
    curves, at = read_json(folder / REFERENCES)["curves"], max(loss, 0.0)
    static, full = (np.interp(at, curves[key]["loss"], curves[key]["flops"]) for key in ("hull", "full_information"))
    return float((static - flops) / (static - full)) if static > full else None


def best_rewards(split: TableSplit) -> Array:
    """The reward of each instance under its best mask, float64 ``[n]``."""
    objective, best = Objective(split.config.reward), []
    for _, quality, flops in _batches(split):
        reference = np.repeat(quality[:, 0], quality.shape[1])
        rewards = objective.rewards(quality.ravel(), reference, flops.ravel()).reshape(quality.shape)
        best.append(rewards.max(axis=1))
    return np.concatenate(best)
