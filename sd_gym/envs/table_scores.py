"""What the decisions in a table are worth and cost. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sd_gym.going_on import going_on_flops, resumed_from

Array = NDArray
MasksOf = Callable[[Array], Array]  # from decisions [n, components] to the numbers of their masks [n]


def is_packed(tensors: dict[str, Array]) -> bool:
    """Whether the qualities of a split have two values, which are kept in bits."""
    return len(tensors.get("quality_values", range(3))) <= 2


def packed_length(tensors: dict[str, Array], masks: int) -> int:
    """Columns of the qualities of so many masks."""
    return -(-masks // 8) if is_packed(tensors) else masks


class TableScoring:
    """Qualities of a split's rows under decisions ``[n, components]``, as ``Scoring`` gives them.

    ``masks_of`` gives the masks whose answers count.
    """

    def __init__(self, tensors: dict[str, Array], masks: int, masks_of: MasksOf) -> None:
        self._codes, self._values = tensors["quality"], tensors.get("quality_values")
        self._masks, self._masks_of, self._is_packed = masks, masks_of, is_packed(tensors)
        self._dense = self._at(np.arange(len(self._codes)), np.zeros(1, dtype=np.int64))

    def of_masks(self, rows: Array) -> Array:
        """Qualities of rows ``[n]`` under all masks, float64 ``[n, masks]``."""
        codes = self._codes[rows]
        return self._worth(np.unpackbits(codes, axis=1, count=self._masks) if self._is_packed else codes)

    def _at(self, rows: Array, masks: Array) -> Array:
        """Qualities of rows ``[n]``, each under the mask of that number in ``masks [n]``, float64 ``[n]``."""
        if not self._is_packed:
            return self._worth(self._codes[rows, masks])
        return self._worth((self._codes[rows, masks >> 3] >> (7 - (masks & 7)).astype(np.uint8)) & 1)

    def of_one(self, row: int, mask: int) -> tuple[float, float]:
        """Quality of a row under the mask of that number, and dense quality."""
        code = self._codes[row, mask >> 3 if self._is_packed else mask]
        if self._is_packed:
            code = (int(code) >> (7 - (mask & 7))) & 1
        return float(code if self._values is None else self._values[code]), self._dense.item(row)

    def _worth(self, codes: Array) -> Array:
        """The qualities, float64, that codes stand for."""
        return codes.astype(np.float64) if self._values is None else self._values[codes]

    def quality(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality under the decisions and dense quality, each float64 ``[n]``."""
        return self.run(rows, decisions), self._dense[rows]

    def run(self, rows: Array, decisions: Array) -> Array:
        """Quality under the decisions, float64 ``[n]``."""
        return self._at(rows, self._masks_of(decisions))

    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality, and 0 as the likelihood of the reference, which no table has; each float64 ``[n]``."""
        return self.run(rows, decisions), np.zeros(len(rows))

    def under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]:
        """``quality_and_likelihood`` of rows ``[n]`` under each of some decisions, each float64 ``[n, masks]``."""
        quality = self._at(rows[:, None], self._masks_of(masks))
        return quality, np.zeros_like(quality)

    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]:
        """None: a data set's own metric is not the mean of anything that is in a table."""
        return {}

    def score_dense(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """All is known."""


class TableCosts:
    """FLOPs of a split's rows under decisions ``[n, components]``, as ``Costs`` gives them."""

    def __init__(
        self,
        tensors: dict[str, Array],
        masks: Array,
        masks_of: MasksOf,
        goes_on: Callable[[Array], Array],
        points: Sequence[int],
    ) -> None:
        self._masks_of, self._goes_on, self._masks, self._points = masks_of, goes_on, masks, points
        self._of = tensors["costs"]  # which of the costs an instance has
        self._always, self._switched = tensors["always"], tensors["switched"]
        self._runs, self._level = 1 - masks[:, :-1], masks[:, -1]
        self._dense = self._always[:, 0] + self._switched[:, 0].sum(axis=1)

    @cached_property
    def _ratio(self) -> Array:
        """FLOPs ratio of each of the different costs under all masks, float64 ``[costs, masks]``."""
        found = np.empty((len(self._always), len(self._runs)))
        for level in np.unique(self._level):
            at = self._level == level
            # Products of whole numbers below 2^53 are exact in float64 too, which is multiplied much faster.
            switched = self._switched[:, level].astype(np.float64) @ self._runs[at].T.astype(np.float64)
            found[:, at] = self._always[:, level, None] + switched
        return found / self._dense[:, None]

    def flops(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions, int64 ``[n]``, those of going on included."""
        masks, of = self._masks_of(decisions), self._of[rows]
        level = self._level[masks]
        flops = self._always[of, level] + np.einsum("ns,ns->n", self._switched[of, level], self._runs[masks])
        return flops + self._goes_on(decisions) * self._going_on[of, masks]

    def flops_ratio(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions over dense FLOPs, float64 ``[n]``."""
        masks, of, goes_on = self._masks_of(decisions), self._of[rows], self._goes_on(decisions)
        ratio = self._ratio[of, masks]
        return ratio + goes_on * self._going_on[of, masks] / self._dense[of] if goes_on.any() else ratio

    def going_on(self, rows: Array, masks: Array) -> Array:
        """FLOPs of going on after decisions ``[n, components]``, int64 ``[n]``; see ``Costs.going_on``."""
        return self._going_on[self._of[rows], self._masks_of(masks)]

    @cached_property
    def _going_on(self) -> Array:
        """Of each of the different costs after all masks, int64 ``[costs, masks]``."""
        resumed = resumed_from(self._masks, self._points)
        return np.stack(
            [
                going_on_flops(np.full(len(resumed), always), np.tile(switched, (len(resumed), 1)), resumed)
                for always, switched in zip(self._always[:, 0], self._switched[:, 0], strict=True)
            ]
        )

    def ratio_of_one(self, row: int, mask: int) -> float:
        """FLOPs ratio of a row under the mask of that number."""
        return self._ratio.item(self._of[row], mask)

    def dense_flops(self, rows: Array) -> Array:
        """FLOPs of the dense backbone, int64 ``[n]``."""
        return self._dense[self._of[rows]]

    def head_flops(self, rows: Array) -> Array:
        """FLOPs of the head, which no decision saves, int64 ``[n]``."""
        return self._always[self._of[rows], 0]

    def of_masks(self, rows: Array) -> Array:
        """FLOPs ratio of rows ``[n]`` under all masks, float64 ``[n, masks]``."""
        return self._ratio[self._of[rows]]
