"""Operating points: the tested versions of a policy, and which of them a limit asks for."""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple


class OperatingPoint(NamedTuple):
    """A version of a policy, tested on the validation split."""

    margin: float  # in log-odds, relative to the selected policy (0); higher skips less
    loss: float  # mean quality lost
    highest_loss: float  # its one-sided upper bound, at the confidence of the selection
    flops_ratio: float  # FLOPs over dense FLOPs, without the policy's own
    passed: bool  # whether the test shows that less than epsilon is lost


def margin_for(points: Sequence[OperatingPoint], *, max_loss: float | None, max_flops: float | None) -> float:
    """The margin of the operating point that fits a limit; 0, that of the policy itself, without a limit.

    Args:
        points: The operating points, the one that skips most first.
        max_loss: Choose the last point, from dense to bold, before the first that may lose more than this, in the
            task's unit (0.005: half a point), by its upper bound (``highest_loss``).
        max_flops: Choose the point that skips least, of those that passed their test and run no more than this share
            of the dense FLOPs.

    Raises:
        ValueError: If both limits are given, or no point fits; the message lists the points.
    """
    if max_loss is not None and max_flops is not None:
        raise ValueError("expected max_loss or max_flops, got both; pass one of them")
    if max_loss is not None:
        asked = f"max_loss={max_loss}"
        fitting = [*takewhile(lambda point: point.highest_loss <= max_loss, points[::-1])][-1:]
    elif max_flops is not None:
        asked = f"max_flops={max_flops}"
        within = [point for point in points if point.passed and point.flops_ratio <= max_flops]
        fitting = sorted(within, key=lambda point: point.margin)[-1:]
    else:
        return 0.0
    if not fitting:
        known = "; ".join(
            f"{point.flops_ratio:.0%} of the FLOPs, at most {point.highest_loss:.4f} lost"
            + ("" if point.passed else " (not passed)")
            for point in points
        )
        raise ValueError(f"no operating point fits {asked}; there are: {known or 'none that were validated'}")
    return fitting[0].margin
