"""Levels of difficulty if the data have none: quartiles of the dense loss or other facts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def quartiles(values: NDArray) -> NDArray:
    """The quartile of each value, 1 (the lowest) to 4, int64 ``[n]``; equal values share their mean rank.

    Example:
        >>> quartiles(np.array([0.3, 9.0, 0.1, 0.2]))
        array([3, 4, 1, 2])
        >>> quartiles(np.array([5, 5, 5, 5]))
        array([2, 2, 2, 2])
    """
    from scipy.stats import rankdata  # heavy

    return np.floor(4 * (rankdata(values) - 1) / len(values)).astype(np.int64) + 1


def means_by(groups: NDArray, columns: dict[str, NDArray]) -> list[dict[str, Any]]:
    """For each group, ascending: its name, its number of instances, and the mean of each column ``[n, ...]``."""
    rows = []
    for group in np.unique(groups):
        chosen = groups == group
        means = {name: values[chosen].mean(axis=0).tolist() for name, values in columns.items()}
        rows.append({"group": group.item(), "instances": int(chosen.sum()), **means})
    return rows
