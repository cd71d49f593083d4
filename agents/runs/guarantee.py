"""The guarantee of selection: operating points are tested in a fixed sequence, from dense to bold (Learn then Test).

Angelopoulos et al. (2021), "Learn then Test", section 4.2: hypotheses that are ordered without the rows of the tests
are tested one after the other, each at the full level, until the first that is not rejected. Whatever the order, the
probability that a selected point loses epsilon or more is then at most one minus the confidence: such a point is
selected only if the first of them in the sequence passes its test. A good order is a matter of power alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

POINTS = 30  # of a sequence, at most
FINER = 2.0  # power of the levels on the way from dense: steps become shorter where losses are likely
NOISE = 0.5  # standard errors by which a cheaper point has to lose less, for another one to be left out


def sequence(flops: NDArray, losses: NDArray, path: NDArray, most: int = POINTS) -> NDArray:
    """The order to test operating points in, from dense to bold, as far as other rows than those of the tests tell.

    Between dense and the fewest FLOPs lie ``most`` levels, finer and finer; of each level the point that loses least is
    there. So the first steps lose almost nothing, and the last ones are short. Points that are not Pareto-efficient are
    left out: a cheaper one loses less, and not by chance alone. Ties stay, as rows that a policy has learned on may
    show no loss at all; and versions of one policy do not oust each other, as they are a path already.

    Args:
        flops: Mean FLOPs over dense FLOPs, ``[points]``.
        losses: Quality that each row loses at each point, ``[points, rows]``.
        path: Of each point, a number that versions of one policy share, ``[points]``.
        most: Points of the sequence, at most.

    Returns:
        Numbers of the points, int64 ``[at most most]``, down in FLOPs.
    """
    cheaper = np.flatnonzero(flops < 1)
    if not len(cheaper):
        return cheaper
    loss = losses.mean(axis=1)
    way = (1 - flops[cheaper]) / (1 - flops[cheaper].min())  # from dense to the boldest
    level = np.minimum(most * (1 - (1 - way) ** (1 / FINER)), most - 1).astype(np.int64)
    by_level = np.lexsort((flops[cheaper], loss[cheaper], level))
    best = cheaper[by_level[np.unique(level[by_level], return_index=True)[1]]]  # the first one of each level
    more = loss[best][:, None] - loss[best]  # that each point loses more than each other one
    covariance = np.atleast_2d(np.cov(losses[best], bias=True))
    variance = np.diag(covariance)
    error = np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 0) / losses.shape[1])
    ousted = (more > NOISE * error) & (path[best][:, None] != path[best])
    kept: list[int] = []  # from bold to dense
    for one in reversed(range(len(best))):
        if not ousted[one, kept].any():
            kept.append(one)
    return best[kept[::-1]]


class Tested(NamedTuple):
    """An operating point that was tested on the selection rows."""

    flops_ratio: float  # over dense FLOPs, a mean, without the FLOPs of deciding
    flops_ratio_with_policy: float
    loss: float  # quality lost, a mean; negative where some is gained
    highest_loss: float  # the upper bound of the loss, one-sided, at the confidence of the selection
    passed: bool  # whether it is shown to lose less than epsilon


def guarantee(rows: int, epsilon: float, confidence: float, is_dense: bool) -> str:
    """In words, what selection says of the point that it has selected."""
    less = f"less than {_points(epsilon)} with {100 * confidence:g}% confidence"
    if is_dense:
        return f"dense: on {rows:,} rows no operating point is shown to lose {less}"
    return f"selected on {rows:,} rows: loses {less}"


def on_other_rows(instances: int, split: str, difference: float, interval: tuple[float, float]) -> str:
    """In words, what was lost on other rows, with its 95% interval: ``quality - quality_ref`` is given."""
    low, high = (100 * bound + 0.0 for bound in (-interval[1], -interval[0]))
    return f"on {instances:,} {split} rows it lost {-100 * difference + 0.0:.1f} ({low:.1f} to {high:.1f})"


def _points(epsilon: float) -> str:
    points = 100 * epsilon
    return f"{points:g} point{'' if points == 1 else 's'}"
