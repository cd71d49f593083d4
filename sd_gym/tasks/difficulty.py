"""How hard instances are, where the data do not say: by quartiles of what is known of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def quartiles(values: NDArray) -> NDArray:
    """The quartile of each value, 1 (the lowest) to 4, int64 ``[n]``; equal values are in the same one.

    A value's quartile is that of the middle of the ranks that it has, so where many values are equal some quartiles
    stay empty.

    Example:
        >>> quartiles(np.array([0.3, 9.0, 0.1, 0.2]))
        array([3, 4, 1, 2])
        >>> quartiles(np.array([5, 5, 5, 5]))
        array([2, 2, 2, 2])
    """
    ordered = np.sort(values)
    below, up_to = np.searchsorted(ordered, values, side="left"), np.searchsorted(ordered, values, side="right")
    middle = (below + up_to - 1) / 2
    return np.floor(4 * middle / len(values)).astype(np.int64) + 1


def means_by(groups: NDArray, columns: dict[str, NDArray]) -> list[dict[str, float]]:
    """For each group, ascending: its name, how many instances it has, and the mean of each column over them."""
    found = []
    for group in np.unique(groups):
        chosen = groups == group
        means = {name: float(values[chosen].mean()) for name, values in columns.items()}
        found.append({"group": group.item(), "instances": int(chosen.sum()), **means})
    return found
