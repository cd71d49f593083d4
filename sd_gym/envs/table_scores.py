"""Quality and FLOPs of the decisions in a table. Nothing here needs torch."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.envs.table_files import READ
from sd_gym.going_on import going_on_flops, resumed_from

MasksOf = Callable[[Array], Array]  # from decisions [n, components] to the indices of their masks [n]


def is_packed(tensors: dict[str, Array]) -> bool:
    """Whether the qualities of a split have at most two values, which are stored as bits."""
    return len(tensors.get("quality_values", range(3))) <= 2


def packed_length(tensors: dict[str, Array], masks: int) -> int:
    """Columns in which the qualities under ``masks`` masks are stored."""
    return -(-masks // 8) if is_packed(tensors) else masks


class TableScoring:
    """The ``Scores`` of a split of a table.

    ``masks_of`` gives the masks whose answers count; ``is_balanced``: whether qualities are weighted by class.
    """

    def __init__(self, tensors: dict[str, Array], masks: int, masks_of: MasksOf, *, is_balanced: bool = False) -> None:
        self._codes = tensors["quality"]
        self._values = tensors.get("quality_values")
        self._masks = masks
        self._masks_of = masks_of
        self._is_packed = is_packed(tensors)
        self._dense = self._at(np.arange(len(self._codes)), np.zeros(1, dtype=np.int64))
        # The weight of a class that no mask answers right is not known.
        self.highest = 1.0 if self._values is None or not is_balanced else max(1.0, float(self._values.max()))

    def of_masks(self, rows: Array) -> Array:
        """Qualities of rows ``[n]`` under all masks, float64 ``[n, masks]``."""
        codes = self._codes[rows]
        return self._decoded(np.unpackbits(codes, axis=1, count=self._masks) if self._is_packed else codes)

    def _at(self, rows: Array, masks: Array) -> Array:
        """Qualities of rows ``[n]`` under the masks with the indices ``masks [n]``, float64 ``[n]``."""
        if not self._is_packed:
            return self._decoded(self._codes[rows, masks])
        return self._decoded((self._codes[rows, masks >> 3] >> (7 - (masks & 7)).astype(np.uint8)) & 1)

    def of_one(self, row: int, mask: int) -> tuple[float, float]:
        """Quality of a row under the mask with that index, and dense quality."""
        code = self._codes[row, mask >> 3 if self._is_packed else mask]
        if self._is_packed:
            code = (int(code) >> (7 - (mask & 7))) & 1
        return float(code if self._values is None else self._values[code]), self._dense.item(row)

    def _decoded(self, codes: Array) -> Array:
        """The qualities, float64, of their indices."""
        return codes.astype(np.float64) if self._values is None else self._values[codes]

    def quality(self, rows: Array, decisions: Array, resume_from: object = None) -> tuple[Array, Array]:
        """Quality under the decisions and dense quality, each float64 ``[n]``; ``resume_from`` is ignored."""
        return self.run(rows, decisions), self._dense[rows]

    def run(self, rows: Array, decisions: Array) -> Array:
        """Quality under the decisions, float64 ``[n]``."""
        return self._at(rows, self._masks_of(decisions))

    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality, and 0 for the likelihood, which a table does not have; each float64 ``[n]``."""
        return self.run(rows, decisions), np.zeros(len(rows))

    def under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]:
        """``quality_and_likelihood`` of rows ``[n]`` under each of several decisions, each float64 ``[n, masks]``."""
        quality = self._at(rows[:, None], self._masks_of(masks))
        return quality, np.zeros_like(quality)

    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]:
        """Empty: the metric of a data set cannot be computed from a table."""
        return {}

    def score_dense(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """Does nothing: a table has all qualities."""


class TableCosts:
    """The ``Costs`` of a split of a table; ``points`` are the switches from which a pass can be resumed."""

    def __init__(
        self,
        tensors: dict[str, Array],
        masks: Array,
        masks_of: MasksOf,
        goes_on: Callable[[Array], Array],
        points: Sequence[int],
    ) -> None:
        self._masks_of = masks_of
        self._goes_on = goes_on
        self._masks = masks
        self._points = points
        self._costs_of = tensors["costs"]  # row of each instance in the costs
        self._always = tensors["always"]
        self._switched = tensors["switched"]
        self._read = tensors.get(READ, self._switched[:, 0])  # missing where texts are not generated after a prompt
        self._runs = 1 - masks[:, :-1]
        self._level = masks[:, -1]
        self._dense = self._always[:, 0] + self._switched[:, 0].sum(axis=1)

    @cached_property
    def _ratio(self) -> Array:
        """FLOPs ratio of each of the different costs under all masks, float64 ``[costs, masks]``."""
        flops = np.empty((len(self._always), len(self._runs)))
        for level in np.unique(self._level):
            at = self._level == level
            # Products of integers below 2^53 are exact in float64, whose matrix product is much faster.
            switched = self._switched[:, level].astype(np.float64) @ self._runs[at].T.astype(np.float64)
            flops[:, at] = self._always[:, level, None] + switched
        return flops / self._dense[:, None]

    def flops(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions, int64 ``[n]``, with those of going on."""
        masks, costs = self._masks_of(decisions), self._costs_of[rows]
        level = self._level[masks]
        flops = self._always[costs, level] + np.einsum("ns,ns->n", self._switched[costs, level], self._runs[masks])
        return flops + self._goes_on(decisions) * self._going_on[costs, masks]

    def flops_ratio(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions over dense FLOPs, float64 ``[n]``."""
        masks = self._masks_of(decisions)
        costs = self._costs_of[rows]
        goes_on = self._goes_on(decisions)
        ratio = self._ratio[costs, masks]
        return ratio + goes_on * self._going_on[costs, masks] / self._dense[costs] if goes_on.any() else ratio

    def going_on(self, rows: Array, masks: Array) -> Array:
        """FLOPs of going on after decisions ``[n, components]``, int64 ``[n]``; see ``Costs.going_on``."""
        return self._going_on[self._costs_of[rows], self._masks_of(masks)]

    @cached_property
    def _going_on(self) -> Array:
        """FLOPs of going on, for each of the different costs after each mask, int64 ``[costs, masks]``."""
        resumed = resumed_from(self._masks, self._points)
        return np.stack(
            [
                going_on_flops(np.full(len(resumed), always), np.tile(switched, (len(resumed), 1)), resumed, read[None])
                for always, switched, read in zip(self._always[:, 0], self._switched[:, 0], self._read, strict=True)
            ]
        )

    def ratio_of_one(self, row: int, mask: int) -> float:
        """FLOPs ratio of a row under the mask with that index."""
        return self._ratio.item(self._costs_of[row], mask)

    def dense_flops(self, rows: Array) -> Array:
        """FLOPs of the dense backbone, int64 ``[n]``."""
        return self._dense[self._costs_of[rows]]

    def head_flops(self, rows: Array) -> Array:
        """FLOPs of the head, which no decision skips, int64 ``[n]``."""
        return self._always[self._costs_of[rows], 0]

    def of_masks(self, rows: Array) -> Array:
        """FLOPs ratio of rows ``[n]`` under all masks, float64 ``[n, masks]``."""
        return self._ratio[self._costs_of[rows]]
