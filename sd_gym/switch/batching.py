"""Which rows of a batch share a forward pass: rows of similar length, and rows with the same decision.

A pass of mixed decisions gathers and scatters rows at every sublayer that only some rows run, and pads short rows to
the longest. Separate passes for equal decisions or lengths save that, but each pass makes its own calls.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Measured on a CPU. On an accelerator a call costs more, so fewer passes are better. Costs are in units of what a
# token costs in a sublayer, per width: that cost grows faster with the width than these costs do.
CALL = 16_000  # cost of one more call of the sublayer
MIXING = 13  # cost per token of gathering and scattering
PLAIN_CALL = 4_000  # as CALL, where rows with the same decision run on a plain model (of a bank)


def passes(
    skip: NDArray, lengths: NDArray, width: int, steps: int = 0, most: int | None = None, *, plain: bool = False
) -> list[NDArray]:
    """Divide a batch into the forward passes that are cheapest by a cost model.

    A pass is divided by length, or the commonest decisions get their own passes and all other rows share one. The
    cheaper division is taken, and its parts are divided again while that saves cost. Every row is in exactly one pass,
    so ``results[rows] = ...`` restores the order. With ``most``, rows of similar decisions share a pass, so that fewer
    sublayers run: in ``generate()`` reading the weights takes most of the time.

    Args:
        skip: Decisions, integers or booleans ``[n, switches]``; 1 = the row skips the sublayer.
        lengths: Tokens of each row that run (without padding and dropped tokens), int ``[n]``; or ``[n, switches]``
            where they differ per switch, as between encoder and decoder.
        width: The model's hidden size; a wide model computes more per call.
        steps: Tokens that ``generate()`` appends to the input, each of which calls every sublayer again; 0: one pass.
        most: Largest number of rows per pass; ``None``: no limit.
        plain: Whether rows that share a decision run on a plain model, whose calls are faster.

    Returns:
        Indices of each pass's rows, int64.

    Raises:
        ValueError: If the shapes disagree, or ``most`` is less than 1.

    Example:
        >>> skip = np.array([[0, 1], [0, 1], [1, 0], [0, 1]])
        >>> passes(skip, np.array([9, 9, 9, 9]), width=512)  # short rows: one pass
        [array([0, 1, 2, 3])]
        >>> passes(skip, np.array([900, 900, 900, 900]), width=512)  # long rows: one pass per decision
        [array([0, 1, 3]), array([2])]
        >>> passes(np.zeros((3, 2)), np.array([900, 9, 9]), width=512)  # short rows are not padded to the long one
        [array([1, 2]), array([0])]
        >>> passes(skip, np.array([9, 9, 9, 9]), width=512, most=3)  # rows with the same decision
        [array([0, 1, 3]), array([2])]
    """
    runs, lengths = ~np.asarray(skip).astype(bool), np.asarray(lengths)
    if runs.ndim != 2 or lengths.shape not in (runs.shape[:1], runs.shape):
        raise ValueError(
            "skip must be [n, switches] and lengths [n] or [n, switches]; "
            f"got {list(runs.shape)} and {list(lengths.shape)}"
        )
    if most is not None and most < 1:
        raise ValueError(f"most must be at least 1 row per pass, got {most}")
    if len(runs) == 1:
        return [np.zeros(1, dtype=np.int64)]
    lengths = np.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], runs.shape)
    if most is not None and len(runs) > most:
        order = np.lexsort((lengths.sum(axis=1), *runs.T))
        parts = np.split(order, range(most, len(order), most))
        return [part[rows] for part in parts for rows in passes(skip[part], lengths[part], width, steps, plain=plain)]
    if not len(runs):
        return []
    return _Batch(runs, lengths, width, steps, plain).planned()


class _Plan(NamedTuple):
    cost: float
    parts: list[NDArray]


class _Batch:
    """A batch and the costs of dividing it; ``runs`` and ``lengths`` are ``[n, switches]``."""

    def __init__(self, runs: NDArray, lengths: NDArray, width: int, steps: int, plain: bool) -> None:
        self._runs = runs
        self._lengths = lengths
        self._steps = steps
        self._call = (PLAIN_CALL if plain else CALL) / width
        self._mixing = MIXING / width
        self._decisions, group = np.unique(runs, axis=0, return_inverse=True)
        self._group = group.reshape(-1)

    def planned(self) -> list[NDArray]:
        """The rows of each pass of the cheapest plan."""
        rows = np.argsort(self._lengths.sum(axis=1), kind="stable")
        plan, by_decision = self._cut(rows), self._by_decision(rows)
        if by_decision.cost < plan.cost:  # the greedy divisions may have missed the best plan
            plan = self._each_cut(by_decision.parts)
        return plan.parts

    def _cut(self, rows: NDArray) -> _Plan:
        """Rows divided in the cheaper way, and their parts again; one pass if no division saves cost."""
        runs, lengths = self._runs[rows], self._lengths[rows]
        whole = float(self._cost(runs.sum(axis=0), np.array(len(rows)), lengths.max(axis=0)))
        best = min(self._by_length(rows), self._by_decision(rows), key=lambda plan: plan.cost)
        return _Plan(whole, [rows]) if best.cost >= whole else self._each_cut(best.parts)

    def _each_cut(self, parts: list[NDArray]) -> _Plan:
        plans = [self._cut(rows) for rows in parts]
        return _Plan(sum(plan.cost for plan in plans), [part for plan in plans for part in plan.parts])

    def _by_length(self, rows: NDArray) -> _Plan:
        """Two passes: the shorter rows and the longer rows."""
        if len(rows) < 2:
            return _Plan(np.inf, [rows])
        runs = self._runs[rows]
        lengths = self._lengths[rows]
        size = np.arange(1, len(rows) + 1)
        shorter = self._cost(runs.cumsum(axis=0), size, np.maximum.accumulate(lengths))
        longer = self._cost(_suffix_accumulate(runs), size[::-1], _suffix_accumulate(lengths, np.maximum))
        both = shorter[:-1] + longer[1:]
        end = int(both.argmin())
        return _Plan(both[end], [rows[: end + 1], rows[end + 1 :]])

    def _by_decision(self, rows: NDArray) -> _Plan:
        """One pass for each of the commonest decisions, while that saves cost, and one for all other rows."""
        present, group = np.unique(self._group[rows], return_inverse=True)
        if len(present) < 2:
            return _Plan(np.inf, [rows])
        decisions, lengths = self._decisions[present], self._lengths[rows]
        common = np.argsort(-np.bincount(group, weights=lengths.sum(axis=1)), kind="stable")  # most tokens first
        group, decisions = np.argsort(common)[group], decisions[common]
        size = np.bincount(group)
        longest = np.zeros(decisions.shape, dtype=np.int64)
        np.maximum.at(longest, group, lengths)
        count = size[:, None] * decisions
        own = self._cost(count, size, longest)
        # Cost of the pass of all other rows when the first 1, 2, ... decisions have their own; without rows it is 0.
        shared = self._cost(
            _suffix_accumulate(count), _suffix_accumulate(size), _suffix_accumulate(longest, np.maximum)
        )
        costs = np.append(shared[1:], 0) + own.cumsum()
        separate = int(costs.argmin()) + 1
        parts = [rows[group == number] for number in range(separate)]
        return _Plan(costs[separate - 1], parts + [rows[group >= separate]] * (separate < len(size)))

    def _cost(self, count: NDArray, size: NDArray, longest: NDArray) -> NDArray:
        """Costs of passes, from the rows that run each sublayer, ``[..., switches]``, all rows, and the longest."""
        called = (count > 0).sum(axis=-1) + 1  # 1 for embeddings and heads, which always run
        calls = self._call * called * (1 + self._steps)
        size = size[..., None]
        moved = self._mixing * size * (count % size > 0)
        return calls + ((longest + self._steps) * (count + moved)).sum(axis=-1)


def _suffix_accumulate(values: NDArray, combine: np.ufunc = np.add) -> NDArray:
    """Sums (or maxima) from each position to the end."""
    return combine.accumulate(values[::-1], dtype=np.int64)[::-1]
