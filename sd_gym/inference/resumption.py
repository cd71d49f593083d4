"""Going on after an answer: rows run densely from their first skipped sublayer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.going_on import resumed_from
from sd_gym.switch import PassState, Switchboard
from sd_gym.switch.cache import LayerKeys
from sd_gym.switch.stages import BETWEEN, EVERY_LAYER


class Resumption:
    """The hidden states of a pass from which its rows can go on (``sd_gym.going_on``).

    Args:
        board: The model's switchboard.
        points: Indices of the switches before which a pass can be resumed (``Head.resume_points``).
        decided: Index of the first switch that each stage of the policy decides on; all before the first of them run.

    Attributes:
        stages: Names of the stages at which the pass has to call ``store``.
    """

    def __init__(self, board: Switchboard, points: Sequence[int], decided: Sequence[int]) -> None:
        self._points = points
        earliest = max(point for point in points if point <= decided[0])
        self._point_of = {
            name: columns.start
            for name, columns in board.decided_at([EVERY_LAYER]).items()
            if columns.start in points and columns.start >= max(earliest, 1)  # at the start there is no state
        }
        # The points where rows that have skipped nothing may still skip something before the next point.
        following = dict(zip(points, [*points[1:], len(board)], strict=True))
        self._early = {start for start in following if any(start < later < following[start] for later in decided)}
        self.stages = list(self._point_of)
        self._from = np.zeros(0, dtype=np.int64)  # the switch from which each row would go on
        # Rows and their state, what earlier layers hold of all rows, and the tokens that the pass keeps.
        self._states: list[tuple[NDArray, PassState, tuple[LayerKeys, ...] | None, NDArray | Tensor | None]] = []

    def store(self, state: PassState, masks: NDArray, keep: NDArray | Tensor | None) -> None:
        """Store the state at a stage of the rows that go on from it, or may do so by a later decision.

        ``masks``: those so far, int ``[n, switches + 1]``. ``keep``: the tokens that the pass keeps, bool
        ``[n, length]``; ``None``: all.
        """
        self._from = resumed_from(masks, self._points)
        point = self._point_of.get(state.stage, -1)
        rows = np.flatnonzero(self._from >= point if point in self._early else self._from == point)
        if not len(rows):
            return
        keys, state = state.keys, replace(state, keys=None)  # which only refer to the cache, so they are taken later
        if len(rows) < len(self._from):
            state = state.rows(torch.from_numpy(rows).to(state.hidden.device))
        self._states.append((rows, state, keys, keep))

    def parts(self, goes_on: NDArray) -> Iterator[tuple[NDArray, PassState | None]]:
        """Groups of rows, int64 ``[rows]``, that go on from the same switch, and their state; ``None``: from the start.

        ``goes_on``: which rows go on, bool ``[n]``. Rows that skipped nothing are left out: their answer is dense.
        """
        from_start = np.flatnonzero((self._from == 0) & goes_on)
        if len(from_start):
            yield from_start, None
        for rows, state, keys, keep in self._states:
            again = np.flatnonzero(goes_on[rows] & (self._from[rows] == self._point_of[state.stage]))
            if not len(again):
                continue
            own, device = rows[again], state.hidden.device
            if len(again) < len(rows):
                state = state.rows(torch.from_numpy(again).to(device))
            if keys is not None:
                inputs, positions = torch.from_numpy(own).to(device), state.hidden.shape[1]
                state = replace(state, keys=tuple(layer.of(inputs, positions) for layer in keys))
            yield own, state if keep is None else _at_all_positions(state, keep[own])


def _at_all_positions(state: PassState, keep: NDArray | Tensor) -> PassState:
    """Scatter states of rows that dropped no tokens to their positions: other rows dropped some, so all moved."""
    order = np.argsort(~np.asarray(torch.as_tensor(keep).cpu(), dtype=np.bool_), axis=1, kind="stable")

    def spread(hidden: Tensor) -> Tensor:
        *before, kept, width = hidden.shape
        index = torch.from_numpy(order[:, :kept]).to(hidden.device)
        index = index.view(len(order), *[1] * (hidden.ndim - 3), kept, 1).expand_as(hidden)
        return hidden.new_zeros(*before, order.shape[1], width).scatter(-2, index, hidden)

    encoded = None if state.encoded is None else spread(state.encoded)
    of_input = state.encoded is None or state.stage == BETWEEN
    keys = state.keys and tuple(LayerKeys(spread(layer.keys), spread(layer.values)) for layer in state.keys)
    return replace(state, hidden=spread(state.hidden) if of_input else state.hidden, encoded=encoded, keys=keys)
