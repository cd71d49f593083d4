"""Going on for real: rows of a pass that has answered run densely from in front of their first skipped sublayer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.going_on import resumed_from
from sd_gym.switch import PassState, Switchboard
from sd_gym.switch.context import Block
from sd_gym.switch.stages import BETWEEN, EVERY_LAYER


class Resumption:
    """What a pass keeps of its hidden states, so that its rows can go on (``sd_gym.going_on``).

    Args:
        board: Of the model.
        points: Numbers of the switches in front of which a pass can be taken up again (``Head.resume_points``).
        decided: The first switch that is decided on; all before it run.

    Attributes:
        stages: Names of the stages where the pass has to call ``keep``.
    """

    def __init__(self, board: Switchboard, points: Sequence[int], decided: int) -> None:
        self._board, self._points = board, points
        self._point_of = {
            name: columns.start
            for name, columns in board.decided_at([EVERY_LAYER]).items()
            if columns.start in points and columns.start >= max(decided, 1)  # from the start, nothing is needed
        }
        self.stages = list(self._point_of)
        self._from = np.zeros(0, dtype=np.int64)  # the switch from which each row would go on
        self._kept: list[tuple[NDArray, PassState]] = []

    def decided(self, masks: NDArray) -> None:
        """Know what was decided so far, int ``[n, switches + 1]``."""
        self._from = resumed_from(masks, self._points)

    def keep(self, seen: PassState, keep: NDArray | Tensor | None) -> None:
        """Keep the rows whose first skipped sublayer is in the layer that comes now.

        Args:
            seen: The state at a stage.
            keep: The tokens that the pass keeps, bool ``[n, length]``; ``None``: all.
        """
        rows = np.flatnonzero(self._from == self._point_of.get(seen.stage, -1))
        if not len(rows):
            return
        state = seen if len(rows) == len(self._from) else seen.rows(torch.from_numpy(rows).to(seen.hidden.device))
        self._kept.append((rows, state if keep is None else _at_all_positions(state, keep[rows])))

    def blocks(self, goes_on: NDArray) -> Iterator[tuple[Tensor, Block]]:
        """Of rows that go on, bool ``[n]``: their numbers, int64 ``[rows]``, and the block they run in, by where.

        Rows that have skipped nothing are not among them: their answer is the dense one.
        """
        from_start = np.flatnonzero(self._from == 0)
        dense = np.zeros((1, len(self._board)), dtype=np.bool_)
        for rows, state in [(from_start, None), *self._kept]:
            again = np.flatnonzero(goes_on[rows])
            if not len(again):
                continue
            if state is not None and len(again) < len(rows):
                state = state.rows(torch.from_numpy(again).to(state.hidden.device))
            picked = torch.from_numpy(rows[again]).to(self._board.model.device)
            yield picked, self._board.decide(dense, resume_from=state)


def _at_all_positions(state: PassState, keep: NDArray | Tensor) -> PassState:
    """A state of rows that dropped no token, in a pass in which others did: at the positions of the whole input."""
    order = np.argsort(~np.asarray(torch.as_tensor(keep).cpu(), dtype=np.bool_), axis=1, kind="stable")

    def spread(hidden: Tensor) -> Tensor:
        index = torch.from_numpy(order[:, : hidden.shape[1]]).to(hidden.device)[..., None].expand_as(hidden)
        return hidden.new_zeros(len(order), order.shape[1], hidden.shape[-1]).scatter(1, index, hidden)

    encoded = None if state.encoded is None else spread(state.encoded)
    of_input = state.encoded is None or state.stage == BETWEEN
    return replace(state, hidden=spread(state.hidden) if of_input else state.hidden, encoded=encoded)
