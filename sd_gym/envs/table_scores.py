"""What the decisions in a table are worth and cost. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray
MasksOf = Callable[[Array], Array]  # from decisions [n, components] to the numbers of their masks [n]


class TableScoring:
    """Qualities of a split's rows under decisions ``[n, components]``, as ``Scoring`` gives them."""

    def __init__(self, tensors: dict[str, Array], masks_of: MasksOf) -> None:
        self._tensors, self._masks_of = tensors, masks_of
        self._dense = self.of_masks((slice(None), 0))

    def of_masks(self, index: Any) -> Array:
        """Qualities ``[n, masks]`` of rows ``[n]``, or at another index, float64."""
        codes, values = self._tensors["quality"][index], self._tensors.get("quality_values")
        return codes.astype(np.float64) if values is None else values[codes]

    def quality(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality under the decisions and dense quality, each float64 ``[n]``."""
        return self.run(rows, decisions), self._dense[rows]

    def run(self, rows: Array, decisions: Array) -> Array:
        """Quality under the decisions, float64 ``[n]``."""
        return self.of_masks((rows, self._masks_of(decisions)))

    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality, and the likelihood of the reference, which is rounded to float16; each float64 ``[n]``."""
        masks = self._masks_of(decisions)
        return self.of_masks((rows, masks)), self._tensors["likelihood"][rows, masks].astype(np.float64)

    def under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]:
        """``quality_and_likelihood`` of rows ``[n]`` under each of some decisions, each float64 ``[n, masks]``."""
        every = np.repeat(rows, len(masks)), np.tile(masks, (len(rows), 1))
        quality, likelihood = self.quality_and_likelihood(*every)
        return quality.reshape(len(rows), -1), likelihood.reshape(len(rows), -1)

    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]:
        """None: a data set's own metric is not the mean of anything that is in a table."""
        return {}

    def score_dense(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """All is known."""


class TableCosts:
    """FLOPs of a split's rows under decisions ``[n, components]``, as ``Costs`` gives them."""

    def __init__(self, tensors: dict[str, Array], masks: Array, masks_of: MasksOf) -> None:
        self._masks_of = masks_of
        self._of = tensors["costs"]  # which of the costs an instance has
        self._always, self._switched = tensors["always"], tensors["switched"]
        self._runs, self._level = 1 - masks[:, :-1], masks[:, -1]
        self._dense = self._always[:, 0] + self._switched[:, 0].sum(axis=1)

    def flops(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions, int64 ``[n]``."""
        masks, of = self._masks_of(decisions), self._of[rows]
        level = self._level[masks]
        return self._always[of, level] + np.einsum("ns,ns->n", self._switched[of, level], self._runs[masks])

    def flops_ratio(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions over dense FLOPs, float64 ``[n]``."""
        return self.flops(rows, decisions) / self.dense_flops(rows)

    def dense_flops(self, rows: Array) -> Array:
        """FLOPs of the dense backbone, int64 ``[n]``."""
        return self._dense[self._of[rows]]

    def head_flops(self, rows: Array) -> Array:
        """FLOPs of the head, which no decision saves, int64 ``[n]``."""
        return self._always[self._of[rows], 0]

    def of_masks(self, rows: Array) -> Array:
        """FLOPs ratio of rows ``[n]`` under all masks, float64 ``[n, masks]``."""
        of = self._of[rows]
        found = np.empty((len(of), len(self._runs)))
        for level in np.unique(self._level):
            at = self._level == level
            # Products of whole numbers below 2^53 are exact in float64 too, which is multiplied much faster.
            switched = self._switched[of, level].astype(np.float64) @ self._runs[at].T.astype(np.float64)
            found[:, at] = self._always[of, level, None] + switched
        return found / self._dense[of, None]
