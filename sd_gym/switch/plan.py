"""Which rows of a batch run in one forward pass: rows of about the same length, and rows that share a decision.

A pass of mixed decisions gathers and scatters rows at every sublayer that only some of them run, and pads short rows to
the longest. Passes of their own for equal decisions or lengths save that, but each makes its own calls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# As measured on a CPU (benchmarks/bucketing.py); on an accelerator a call costs more, so that fewer passes are better.
# Both over the width, in what running the sublayer costs a token: that grows faster with the width than they do.
CALL = 16_000  # what one more call of the sublayer costs
MIXING = 13  # what gathering and scattering costs a token


def passes(skip: NDArray, lengths: NDArray, width: int, steps: int = 0, most: int | None = None) -> list[NDArray]:
    """Cut a batch into the forward passes that a cost model finds the cheapest.

    The commonest decisions get passes of their own as long as that pays, all other rows share one; then each is sorted
    by length and cut in two as long as that pays. Every row is in exactly one pass, and gets from it what it gets
    alone; ``results[rows] = ...`` brings the results back into order.

    Where a pass may have few rows only, those go together that have the same decision or, of the rare ones, one that
    is like it: then fewer sublayers have a row that runs them, and in ``generate()``, where reading the weights takes
    the time, that counts more than how many rows run them.

    Args:
        skip: Decisions, integers or booleans ``[n, switches]``; 1 = the row skips the sublayer.
        lengths: Tokens of each row that run (without padding and dropped ones), int ``[n]``, or ``[n, switches]`` where
            they differ from switch to switch, as between encoder and decoder.
        width: The model's hidden size. In a wide model a call weighs little beside what it computes.
        steps: Tokens that ``generate()`` makes behind the input; 0: a single pass. Each step calls every sublayer
            again, so that the batch is cut less.
        most: Rows of a pass at most; ``None``: any number.

    Returns:
        Indices of each pass's rows, int64.

    Raises:
        ValueError: If the shapes disagree, or a pass may have no row.

    Example:
        >>> skip = np.array([[0, 1], [0, 1], [1, 0], [0, 1]])
        >>> passes(skip, np.array([9, 9, 9, 9]), width=512)  # short rows: one pass
        [array([0, 1, 2, 3])]
        >>> passes(skip, np.array([900, 900, 900, 900]), width=512)  # long rows: one a decision
        [array([0, 1, 3]), array([2])]
        >>> passes(np.zeros((3, 2)), np.array([900, 9, 9]), width=512)  # the others are not padded to the long row
        [array([1, 2]), array([0])]
        >>> passes(skip, np.array([9, 9, 9, 9]), width=512, most=3)  # those that agree
        [array([0, 1, 3]), array([2])]
    """
    runs, lengths = ~np.asarray(skip).astype(bool), np.asarray(lengths)
    if runs.ndim != 2 or lengths.shape not in (runs.shape[:1], runs.shape):
        raise ValueError(
            "skip must be [n, switches] and lengths [n] or [n, switches]; "
            f"got {list(runs.shape)} and {list(lengths.shape)}"
        )
    if most is not None and most < 1:
        raise ValueError(f"a pass needs room for a row, got most={most}")
    if len(runs) == 1:
        return [np.zeros(1, dtype=np.int64)]
    lengths = np.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], runs.shape)
    if most is not None and len(runs) > most:
        order = np.lexsort((lengths.sum(axis=1), *runs.T))
        parts = np.split(order, range(most, len(order), most))
        return [part[rows] for part in parts for rows in passes(skip[part], lengths[part], width, steps)]

    def cost(count: NDArray, size: NDArray, longest: NDArray) -> NDArray:
        """Costs of passes: rows that run each sublayer, ``[..., switches]``, rows in all, and the longest of them."""
        called = np.count_nonzero(count, axis=-1)
        calls = CALL / width * (called + 1) * (1 + steps)  # one more for what always runs: embeddings and heads
        size = np.expand_dims(size, -1)
        return calls + ((longest + steps) * (count + MIXING / width * size * (count % size > 0))).sum(axis=-1)

    def cut(rows: NDArray) -> list[NDArray]:
        """Rows in ascending order of length, cut where that saves most."""
        if len(rows) < 2:
            return [rows]
        size, own = np.arange(1, len(rows) + 1), lengths[rows]
        first = cost(runs[rows].cumsum(axis=0), size, np.maximum.accumulate(own))
        second = cost(_left(runs[rows]), size[::-1], _left(own, np.maximum))
        both = first[:-1] + second[1:]
        best = int(both.argmin())
        if both[best] >= first[-1]:
            return [rows]
        return cut(rows[: best + 1]) + cut(rows[best + 1 :])

    order = np.argsort(lengths.sum(axis=1), kind="stable")
    return [part for rows in _by_decision(runs, lengths, cost) for part in cut(order[rows[order]])]


def _by_decision(runs: NDArray, lengths: NDArray, cost: Callable[..., NDArray]) -> list[NDArray]:
    """Masks of rows, bool ``[n]``: the commonest decisions one by one, then all others together."""
    if not len(runs):
        return []
    decisions, group = np.unique(runs, axis=0, return_inverse=True)
    group = group.reshape(-1)
    tokens = np.bincount(group, weights=lengths.sum(axis=1))
    common = np.argsort(-tokens, kind="stable")  # those with the most tokens first
    group, decisions = np.argsort(common)[group], decisions[common]
    size = np.bincount(group)
    longest = np.zeros(decisions.shape, dtype=np.int64)
    np.maximum.at(longest, group, lengths)
    count = size[:, None] * decisions
    own = cost(count, size, longest)
    # What is left when the first 0, 1, ... decisions have passes of their own; where nothing is, it costs nothing.
    left = cost(_left(count), _left(size), _left(longest, np.maximum))
    separate = int(np.argmin(np.append(left, 0) + np.append(0, own.cumsum())))
    masks = [group == number for number in range(separate)]
    return masks + [group >= separate] * (separate < len(size))


def _left(values: NDArray, combine: np.ufunc = np.add) -> NDArray:
    """Sums, or maxima, of what stands from each place to the end."""
    return combine.accumulate(values[::-1], dtype=np.int64)[::-1]
