"""The decisions of an attached model's last call, and the share of the FLOPs that ran."""

from __future__ import annotations

from threading import local

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.heads import Head, flops_share
from sd_gym.switch import FlopsModel


class Decisions(local):
    """The decisions of an attached model's last call in this thread.

    Attributes:
        skip: Which row skipped which switch, bool ``[n, switches]``; ``None`` before the first call.
        token_level: The level of each row, int64 ``[n]``: an index of the policy's token shares.
    """

    def __init__(self, head: Head, flops: FlopsModel) -> None:
        self._head, self._flops = head, flops
        self.skip: NDArray | None = None
        self.token_level: NDArray | None = None
        self._lengths: tuple[Tensor, Tensor] | None = None
        self._target: int | None = None
        self._ranked = False

    def record(self, skip: NDArray, token_level: NDArray, lengths: tuple[Tensor, Tensor], ranked: bool) -> None:
        """Remember decisions on inputs of so many tokens, of which so many stay (each ``[n]``), maybe after ranking."""
        self.skip, self.token_level = skip, token_level
        self._lengths, self._target, self._ranked = lengths, None, ranked

    def record_target(self, length: int) -> None:
        """Remember how many tokens the call generated, or read as a target."""
        self._target = length

    @property
    def flops_ratio(self) -> NDArray:
        """FLOPs of the last call over those of a dense one, float64 ``[n]``; the policy's own are not in it.

        A row of padding alone has 1.0: there is nothing to save.

        Raises:
            ValueError: If there was no call.
        """
        if self.skip is None or self._lengths is None:
            raise ValueError("this thread has not called the model yet")
        source, kept = (value.cpu().numpy() for value in self._lengths)
        always, switched = self._costs(source, kept)
        dense_always, dense = self._costs(source, source)
        ran = always + (switched * ~self.skip).sum(axis=1)
        if self._ranked and self.token_level is not None:  # the first attention ran on all tokens to rank them
            ran = ran + np.where(self.token_level > 0, self._flops.costs(source, source)[1][:, 0], 0)
        return flops_share(ran, dense_always + dense.sum(axis=1))

    def _costs(self, source: NDArray, kept: NDArray) -> tuple[NDArray, NDArray]:
        if self._target is None:  # one pass over the input
            return self._flops.costs(source, source, kept)
        return self._head.answer_costs(self._flops, source, np.full_like(source, self._target), kept)
