"""A policy of several stages in one forward pass: what it sees and decides at each of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.heads import Head, reading_ratio
from sd_gym.backbones.load import can_exit
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.features import log_odds, pooled_features, stage_observation, token_observations
from sd_gym.switch import FlopsModel, PassState, Switchboard

Keep = NDArray | Tensor | None  # tokens that stay, [n, length]; None: all


class StagedRollout:
    """Decides in a pass, from stage to stage: ``Switchboard.decide_in_pass`` calls ``choose``.

    Args:
        policy: Decides, at several stages.
        board, head, flops: Of the model.
        length: Tokens of each input, int ``[n]``.
        keeps: Takes the token levels ``[n]`` to the tokens that the pass keeps, and how many that are of each input.
        judge: Runs the pass again, for its logits ``[n, classes]``, where the head judges what a layer gives.
        first: Hidden states and mask of what is seen before the first layer, if not those of the pass itself.
    """

    def __init__(
        self,
        policy: SkipPolicy,
        board: Switchboard,
        head: Head,
        flops: FlopsModel,
        length: NDArray,
        keeps: Callable[[NDArray], tuple[Keep, NDArray]],
        judge: Callable[[], Tensor],
        first: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._policy, self._board, self._head, self._flops = policy, board, head, flops
        self._length, self._keeps, self._judge, self._first = length, keeps, judge, first
        self._judges = can_exit(head, board)
        self._columns = board.decided_at(policy.network.stages)
        self.decisions = np.zeros((len(length), len(board) + 1), dtype=np.int64)  # those made so far
        self.keep: Keep = None  # the tokens that stay
        self._kept = length
        self._tokens: dict[str, NDArray] = {}  # where the policy sees them, at all stages

    def choose(self, seen: PassState) -> tuple[NDArray, Keep]:
        """Decide a stage."""
        columns, is_first = self._columns[seen.stage], seen.stage == "first"
        hidden, mask = self._first if is_first and self._first is not None else (seen.hidden.detach(), seen.mask)
        exits = self.decisions.copy()
        exits[:, columns.start : -1] = 1
        features = pooled_features(hidden, mask).float().cpu().numpy()
        if self._judges:
            judged = np.zeros(len(features)) if is_first else self._judged(seen, exits)
            features = np.concatenate([features, judged[:, None].astype(np.float32)], axis=1)
        ranking = self._policy.ranking_flops(self._flops, self._length, self._kept < self._length)
        share = reading_ratio(self._head, self._flops, self._length, self._kept, exits[:, :-1], ranking)
        number = self._policy.network.stages.index(seen.stage)
        shown = stage_observation(number, share, features, self._policy.mean, self._policy.deviation)
        if is_first and (of_tokens := self._policy.of_tokens) is not None:
            self._tokens = token_observations(hidden, mask, *of_tokens, self._policy.longest)
        decided = self._policy.network.decide({"stage": shown, **self._tokens} if self._tokens else shown)
        self.decisions[:, columns] = decided[:, columns]
        if is_first:
            self.decisions[:, -1] = decided[:, -1]
            self.keep, self._kept = self._keeps(decided[:, -1])
        return decided[:, columns], self.keep if is_first else None

    def _judged(self, seen: PassState, exits: NDArray) -> NDArray:
        """Log-odds of the head's answer if all is skipped from here on, ``[n]``."""
        confidence = self._head.confidence
        assert confidence is not None  # a head that judges has one
        with self._board.decide(exits[:, :-1], self.keep, resume_from=seen):
            return log_odds(confidence(self._judge()).double().cpu().numpy())
