"""FLOPs of decisions on the instances of a split."""

import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.backbones import Backbone
from sd_gym.backbones.heads import reading_ratio
from sd_gym.data.encoded import Encoded
from sd_gym.going_on import going_on_flops, masks_and_goes_on, resumed_from
from sd_gym.tasks.token_dropping import TokenDropping


class Costs:
    """FLOPs of a split's rows under decisions ``[n, switches + 1]``; with the answer stage, ``[n, switches + 2]``.

    ``num_beams`` counts where texts are generated.
    """

    def __init__(self, backbone: Backbone, encoded: Encoded, tokens: TokenDropping, num_beams: int) -> None:
        self._backbone = backbone
        self._encoded = encoded
        self._tokens = tokens
        self._beams = 1 if backbone.head.judges_passes else num_beams
        self.resume_points = backbone.head.resume_points(backbone.board)
        self._components = len(backbone.board) + 1
        everything = np.arange(len(encoded))
        self._always, self._switched = self._costs(everything, np.zeros(len(encoded), dtype=np.int64))
        source, is_text = encoded.source_length, not backbone.head.judges_passes
        self._read = self._costs_of(source, np.ones_like(source), source)[1] if is_text else self._switched

    def flops_ratio(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under decisions over dense FLOPs, float64 ``[n]``."""
        return self.flops(rows, decisions) / self.dense_flops(rows)

    def reading_ratio(self, rows: Array, decisions: Array) -> Array:
        """``flops_ratio`` of an answer of one token, as its length is not known in advance."""
        length, kept = self._encoded.source_length[rows], self._tokens.kept_length(rows, decisions[:, -1])
        head = self._backbone.head
        flops = self._backbone.flops
        ranking = self._ranking(length, kept)
        return reading_ratio(head, flops, length, kept, decisions[:, :-1], ranking)

    def dense_flops(self, rows: Array) -> Array:
        """FLOPs of the dense backbone, int64 ``[n]``."""
        return self._always[rows] + self._switched[rows].sum(axis=1)

    def head_flops(self, rows: Array) -> Array:
        """FLOPs of the head, which no decision saves, int64 ``[n]``."""
        return self._always[rows]

    def flops(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under decisions, int64 ``[n]``, with those of going on, and of ranking tokens where any is dropped."""
        masks, goes_on = masks_and_goes_on(decisions, self._components)
        level = masks[:, -1]
        always, switched = self._costs(rows, level) if level.any() else (self._always[rows], self._switched[rows])
        ranking = self._ranking(self._encoded.source_length[rows], self._tokens.kept_length(rows, level))
        flops = always + (switched * (1 - masks[:, :-1])).sum(axis=1) + ranking
        return flops + goes_on * self.going_on(rows, masks) if goes_on.any() else flops

    def masks(self, decisions: Array) -> Array:
        """The masks ``[n, switches + 1]`` of decisions: all but whether a row goes on."""
        return masks_and_goes_on(decisions, self._components)[0]

    def going_on(self, rows: Array, masks: Array) -> Array:
        """FLOPs of going on after masks, int64 ``[n]``, for all rows; see ``sd_gym.going_on``."""
        first = resumed_from(self.masks(masks), self.resume_points)
        return going_on_flops(self._always[rows], self._switched[rows], first, self.read_flops(rows))

    def read_flops(self, rows: Array) -> Array:
        """FLOPs of each switch of the dense backbone on the input, before a text is generated: ``[n, switches]``."""
        return self._read[rows]

    def by_level(self) -> tuple[Array, Array]:
        """FLOPs that no switch saves, int64 ``[n, levels]``, and those of each switch, ``[n, levels, switches]``."""
        rows = np.arange(len(self._encoded))
        always = []
        switched = []
        nothing = np.zeros((len(rows), self._components), dtype=np.int64)
        for level in range(len(self._tokens.shares)):
            nothing[:, -1] = level
            switched.append(self._costs(rows, nothing[:, -1])[1])
            always.append(self.flops(rows, nothing) - switched[-1].sum(axis=1))
        return np.stack(always, axis=1), np.stack(switched, axis=1)

    def executed_flops(self, rows: Array, decisions: Array, parts: list[Array]) -> int:
        """FLOPs of the forward passes on ``parts`` of the rows, each padded to its longest row, as torch counts them.

        Rows that go on from the same switch run in one pass. ``flops`` counts each row without padding.
        """
        masks, goes_on = masks_and_goes_on(decisions, self._components)
        length = self._encoded.source_length[rows]
        kept = self._tokens.kept_length(rows, masks[:, -1])
        total = 0
        if (kept < length).any():  # all are ranked in one pass
            total = self._tokens.ranking.flops(self._backbone.flops, np.full(len(rows), length.max())).sum()
        for part in parts:
            source, target = length[part], self._encoded.target_length[rows[part]]
            always, switched = self._costs_padded(len(part), source, target, kept[part])
            total += always.sum() + (switched * (1 - masks[part, :-1])).sum()
        first = resumed_from(masks, self.resume_points)
        for start in np.unique(first[goes_on]):
            again = np.flatnonzero(goes_on & (first == start))
            source, target = length[again], self._encoded.target_length[rows[again]]
            always, switched = self._costs_padded(len(again), source, target, source)
            read = self._costs_padded(len(again), source, np.ones_like(source), source)[1]
            total += going_on_flops(always, switched, first[again], read).sum()
        return int(total)

    def _ranking(self, length: Array, kept: Array) -> Array:
        """FLOPs of ranking the tokens of inputs, int64 ``[n]``: 0 where none is dropped."""
        if not (kept < length).any():
            return np.zeros_like(length)
        return np.where(kept < length, self._tokens.ranking.flops(self._backbone.flops, length), 0)

    def _costs(self, rows: Array, level: Array) -> tuple[Array, Array]:
        length, target = self._encoded.source_length[rows], self._encoded.target_length[rows]
        return self._costs_of(length, target, self._tokens.kept_length(rows, level))

    def _costs_padded(self, n: int, *lengths: Array) -> tuple[Array, Array]:
        return self._costs_of(*(np.full(n, values.max()) for values in lengths))

    def _costs_of(self, source: Array, target: Array, kept: Array) -> tuple[Array, Array]:
        return self._backbone.flops.costs(*self._backbone.head.lengths(source, target, kept), beams=self._beams)
