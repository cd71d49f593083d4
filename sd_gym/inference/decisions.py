"""What the last call of an attached model decided, and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from threading import local

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.heads import Head, flops_share
from sd_gym.going_on import going_on_flops
from sd_gym.switch import FlopsModel

RankingFlops = Callable[[FlopsModel, NDArray, NDArray], NDArray]  # ``SkipPolicy.ranking_flops``


class Decisions(local):
    """The decisions of an attached model's last call in this thread; ``None`` before the first call."""

    def __init__(self, head: Head, flops: FlopsModel) -> None:
        self._head = head
        self._flops = flops
        self.skip: NDArray | None = None  # which row skipped which switch, bool ``[n, switches]``
        self.token_level: NDArray | None = None  # an index of the policy's token shares per row, int64 ``[n]``
        self.went_on: NDArray | None = None  # which row went on densely after its answer, bool ``[n]``
        self.resumed = np.zeros(0, dtype=np.int64)  # the switches from which these rows went on, ``[n]``
        self._lengths: tuple[Tensor, Tensor] | None = None
        self._targets: tuple[int | None, int | None] = None, None
        self._beams = 1
        self._ranking: RankingFlops
        self.logits_to_keep = 0  # positions that the head of a decoder-only model ran on, from the end; 0: all

    def record(
        self, skip: NDArray, token_level: NDArray, lengths: tuple[Tensor, Tensor], ranking: RankingFlops
    ) -> None:
        """Store decisions; ``lengths``: of the inputs and of the tokens that stay, each ``[n]``."""
        self.skip = skip
        self.token_level = token_level
        self.went_on = np.zeros(len(skip), dtype=np.bool_)
        self._lengths = lengths
        self._targets = (None, None)
        self._beams = 1
        self._ranking = ranking
        self.logits_to_keep = 0

    def record_target(self, length: int, again: int | None = None, *, beams: int = 1) -> None:
        """Store how many tokens were generated, or read as a target; ``again``: how many in rows that went on."""
        self._targets = (length, again or length)
        self._beams = beams

    @property
    def flops_ratio(self) -> NDArray:
        """FLOPs of the last call, without the policy's own, over those of a dense one, float64 ``[n]``.

        1.0 for a row of padding alone. Raises ``ValueError`` if there was no call.
        """
        if self.skip is None or self.went_on is None or self._lengths is None:
            raise ValueError("this thread has not called the model yet")
        source, kept = (value.cpu().numpy() for value in self._lengths)
        target, target_again = self._targets
        always, switched = self._costs(source, kept, target)
        dense_always, dense = self._costs(source, source, target)
        ran = always + (switched * ~self.skip).sum(axis=1) + self._ranking(self._flops, source, kept < source)
        whole = dense_always + dense.sum(axis=1)
        if self.went_on.any():
            again_always, again = self._costs(source, source, target_again)
            read = again if target_again is None else self._costs(source, source, 1)[1]
            ran = ran + self.went_on * going_on_flops(again_always, again, self.resumed, read)
            whole = np.where(self.went_on, again_always + again.sum(axis=1), whole)
        return flops_share(ran, whole)

    def _costs(self, source: NDArray, kept: NDArray, target: int | None) -> tuple[NDArray, NDArray]:
        one_pass = source, np.minimum(source, self.logits_to_keep or source), kept
        lengths = one_pass if target is None else self._head.lengths(source, np.full_like(source, target), kept)
        return self._flops.costs(*lengths, beams=self._beams)
