"""Which rows of a batch run in one forward pass: rows of about the same length, and rows that share a decision.

A pass of mixed decisions gathers and scatters rows at every sublayer that only some of them run, and pads short rows to
the longest. Passes of their own for equal decisions or lengths save that, but each makes its own calls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# As measured on a CPU (benchmarks/bucketing.py); on an accelerator a call costs more, so that fewer passes are better.
CALL = 32_768  # over the width: tokens that run a sublayer in the time that one more call of it costs
MIXING = 0.05  # what gathering and scattering costs a token, beside running the sublayer


def passes(skip: NDArray, lengths: NDArray, width: int, steps: int = 0) -> list[NDArray]:
    """Cut a batch into the forward passes that a cost model finds the cheapest.

    The commonest decisions get passes of their own as long as that pays, all other rows share one; then each is sorted
    by length and cut in two as long as that pays. Every row is in exactly one pass, and gets from it what it gets
    alone; ``results[rows] = ...`` brings the results back into order.

    Args:
        skip: Decisions, integers or booleans ``[n, switches]``; 1 = the row skips the sublayer.
        lengths: Tokens of each row that run (without padding and dropped ones), int ``[n]``.
        width: The model's hidden size. In a wide model a call weighs little beside what it computes.
        steps: Tokens that ``generate()`` makes behind the input; 0: a single pass. Each step calls every sublayer
            again, so that the batch is cut less.

    Returns:
        Indices of each pass's rows, int64.

    Raises:
        ValueError: If the shapes disagree.

    Example:
        >>> skip = np.array([[0, 1], [0, 1], [1, 0], [0, 1]])
        >>> passes(skip, np.array([9, 9, 9, 9]), width=512)  # short rows: one pass
        [array([0, 1, 2, 3])]
        >>> passes(skip, np.array([900, 900, 900, 900]), width=512)  # long rows: one a decision
        [array([0, 1, 3]), array([2])]
        >>> passes(np.zeros((3, 2)), np.array([900, 9, 9]), width=512)  # the others are not padded to the long row
        [array([1, 2]), array([0])]
    """
    runs, lengths = ~np.asarray(skip).astype(bool), np.asarray(lengths)
    if runs.ndim != 2 or lengths.shape != runs.shape[:1]:
        raise ValueError(
            f"skip must be [n, switches] and lengths [n]; got {list(runs.shape)} and {list(lengths.shape)}"
        )

    def cost(count: NDArray, size: NDArray | int, longest: NDArray | int) -> NDArray:
        """Costs of passes: rows that run each sublayer ``[..., switches]``, rows in all, and the longest of them."""
        called = np.count_nonzero(count, axis=-1)
        mixed = np.count_nonzero(count % np.expand_dims(size, -1), axis=-1)
        calls = CALL / width * (called + 1) * (1 + steps)  # one more for what always runs: embeddings and heads
        return calls + (longest + steps) * (count.sum(axis=-1) + MIXING * size * mixed)

    def cut(rows: NDArray) -> list[NDArray]:
        """Rows in ascending order of length, cut where that saves most."""
        if len(rows) < 2:
            return [rows]
        size, longest = np.arange(1, len(rows)), lengths[rows]
        count = runs[rows].cumsum(axis=0)
        both = cost(count[:-1], size, longest[:-1]) + cost(count[-1] - count[:-1], len(rows) - size, longest[-1])
        best = int(both.argmin())
        if both[best] >= cost(count[-1], len(rows), longest[-1]):
            return [rows]
        return cut(rows[: best + 1]) + cut(rows[best + 1 :])

    order = np.argsort(lengths, kind="stable")
    return [part for rows in _by_decision(runs, lengths, cost) for part in cut(order[rows[order]])]


def _by_decision(runs: NDArray, lengths: NDArray, cost: Callable[..., NDArray]) -> list[NDArray]:
    """Masks of rows, bool ``[n]``: the commonest decisions one by one, then all others together."""
    if not len(runs):
        return []
    decisions, group = np.unique(runs, axis=0, return_inverse=True)
    group = group.reshape(-1)
    common = np.argsort(-np.bincount(group, weights=lengths), kind="stable")  # those with the most tokens first
    group, decisions = np.argsort(common)[group], decisions[common]
    size = np.bincount(group)
    longest = np.zeros(len(size), dtype=np.int64)
    np.maximum.at(longest, group, lengths)
    count = size[:, None] * decisions
    own = cost(count, size, longest)
    # What is left when the first 0, 1, ... decisions have passes of their own; where nothing is, it costs nothing.
    left = cost(*(_left(values) for values in (count, size)), np.maximum.accumulate(longest[::-1])[::-1])
    separate = int(np.argmin(np.append(left, 0) + np.append(0, own.cumsum())))
    masks = [group == number for number in range(separate)]
    return masks + [group >= separate] * (separate < len(size))


def _left(values: NDArray) -> NDArray:
    """Sums of what stands from each place to the end."""
    return values[::-1].cumsum(axis=0)[::-1]
