"""The guarantee of selection: operating points are tested in a fixed sequence, from dense to bold (Learn then Test).

Angelopoulos et al. (2021), "Learn then Test", section 4.2: hypotheses are ordered without the rows of the tests. They
are tested in this order, each at the full level, until one is not rejected. Whatever the order, the probability that a
selected point loses epsilon or more is then at most one minus the confidence: such a point is selected only if the
first of them in the sequence passes its test. The order affects only the power.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

POINTS = 30  # most points of a sequence
ERRORS = 3.0  # standard errors in the bound of a loss: points that change few answers pass more tests


def sequence(flops: NDArray, losses: NDArray, path: NDArray, most: int = POINTS) -> NDArray:
    """The order to test operating points in, from dense to bold; it is estimated on other rows than those of the tests.

    The range from dense to the fewest FLOPs is cut into ``most`` equal levels. Each level keeps the point whose loss
    has the lowest upper bound, as the tests ask for a bound, too (Laufer-Goldshtein et al. 2023, "Efficiently
    controlling multiple risks with Pareto testing"). A point is left out if a cheaper one has a lower bound, by more
    than chance. Ties stay, as rows that a policy has learned on may show no loss. Versions of one policy do not exclude
    each other: they are in order already.

    Args:
        flops: Mean FLOPs over dense FLOPs, ``[points]``.
        losses: Quality that each row loses at each point, ``[points, rows]``.
        path: The index of each point's policy, ``[points]``.
        most: Points of the sequence, at most.

    Returns:
        Indices of the points, int64 ``[at most most]``, by falling FLOPs.
    """
    cheaper = np.flatnonzero(flops < 1)
    if not len(cheaper):
        return cheaper
    bound = losses.mean(axis=1) + ERRORS * losses.std(axis=1) / losses.shape[1] ** 0.5
    boldness = (1 - flops[cheaper]) / (1 - flops[cheaper].min())  # 0: dense, 1: the boldest point
    level = np.minimum(most * boldness, most - 1).astype(np.int64)
    by_level = np.lexsort((flops[cheaper], bound[cheaper], level))
    best = cheaper[by_level[np.unique(level[by_level], return_index=True)[1]]]  # the first one of each level
    more = bound[best][:, None] - bound[best]  # bound of each point minus that of each other one
    covariance = np.atleast_2d(np.cov(losses[best], bias=True))
    variance = np.diag(covariance)
    error = np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 0) / losses.shape[1])
    dominated = (more > error) & (path[best][:, None] != path[best])
    efficient: list[int] = []  # from bold to dense
    for point in reversed(range(len(best))):
        if not dominated[point, efficient].any():
            efficient.append(point)
    return best[efficient[::-1]]


class Tested(NamedTuple):
    """An operating point that was tested on the selection rows."""

    flops_ratio: float  # mean, without the FLOPs of deciding
    flops_ratio_with_policy: float
    loss: float  # mean quality lost; negative: gained
    highest_loss: float  # the one-sided upper bound of the loss, at the confidence of the selection
    passed: bool  # whether it is shown to lose less than epsilon


def guarantee(rows: int, epsilon: float, confidence: float, is_dense: bool) -> str:
    """The guarantee of the selected point, in words."""
    less = f"less than {in_points(epsilon)} with {100 * confidence:g}% confidence"
    if is_dense:
        return f"dense: on {rows:,} rows no operating point is shown to lose {less}"
    return f"selected on {rows:,} rows: loses {less}"


def measured_loss(result: dict[str, Any]) -> str:
    """The loss of a result on the rows of its split, with the 95% interval, in words."""
    low, high = sorted(-100 * bound for bound in result["quality_difference_interval"])
    lost = -100 * result["quality_difference"]
    return f"on {result['instances']:,} {result['split']} rows it lost {lost:z.1f} ({low:z.1f} to {high:z.1f})"


def in_points(epsilon: float) -> str:
    """A quality in words: 0.01 is ``1 point``."""
    points = 100 * epsilon
    return f"{points:g} point{'' if points == 1 else 's'}"
