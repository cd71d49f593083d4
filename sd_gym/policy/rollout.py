"""A policy of several stages in one forward pass: what it sees and decides at each of them, and of the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.heads import Head, reading_ratio
from sd_gym.backbones.load import can_exit
from sd_gym.going_on import ANSWER
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.features import log_odds, pooled_features, stage_observation, token_observations
from sd_gym.policy.resumption import Resumption
from sd_gym.switch import FlopsModel, PassState, Switchboard
from sd_gym.switch.context import Block

Keep = NDArray | Tensor | None  # tokens that stay, [n, length]; None: all


class StagedRollout:
    """Decides in a pass, from stage to stage, and on its answer.

    The pass runs inside of ``deciding``. At the stage ``answer`` it is then judged (``answered``), and rows that go on
    run again from in front of their first skipped sublayer (``going_on``).

    Args:
        policy: Decides, at several stages.
        board, head, flops: Of the model.
        length: Tokens of each input, int ``[n]``.
        keeps: Takes the token levels ``[n]`` to the tokens that the pass keeps, and how many that are of each input.
        judge: Runs the pass again, for its logits ``[n, classes]``, where the head judges what a layer gives.
        first: Hidden states and mask of what is seen before the first layer, if not those of the pass itself.

    Attributes:
        decisions: Masks that were decided so far, int64 ``[n, switches + 1]``.
        keep: The tokens that stay.
        went_on: Which rows go on, bool ``[n]``.
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
        self._judges, self._answer_size = can_exit(head, board), len(head.judgement) * policy.sees_answer
        self._columns = board.decided_at(policy.stages_of_pass)
        self._passing = self._columns  # the stages of the pass, and which switches are decided there
        self._resumption: Resumption | None = None
        if policy.sees_answer:
            decided = next(iter(self._columns.values())).start
            self._resumption = Resumption(board, head.resume_points(board), decided)
            self._passing = board.decided_at([*self._columns, *self._resumption.stages])
        self.decisions = np.zeros((len(length), len(board) + 1), dtype=np.int64)
        self.keep: Keep = None
        self.went_on = np.zeros(len(length), dtype=np.bool_)
        self._kept = length
        self._features = np.zeros((0, 0), dtype=np.float32)  # those of the last stage
        self._tokens: dict[str, NDArray] = {}  # where the policy sees them, at all stages

    def deciding(self, mask: Tensor) -> Block:
        """The block in which the pass runs; ``mask`` of the input's tokens, ``[n, length]``."""
        return self._board.decide_in_pass(self._choose, list(self._passing), mask)

    def answered(self, judged: Tensor | NDArray) -> None:
        """Decide, by the head's judgement ``[n, values]``, which rows go on."""
        said = torch.as_tensor(judged).detach().cpu().numpy()
        self._features[:, self._features.shape[1] - self._answer_size :] = said
        self.went_on = self._decided(ANSWER, self.decisions)[:, -1] == 1

    def going_on(self) -> Iterator[tuple[Tensor, Block]]:
        """The rows that go on and have skipped anything, int64 ``[rows]``, in parts, and the block each runs in."""
        return iter(()) if self._resumption is None else self._resumption.blocks(self.went_on)

    def _choose(self, seen: PassState) -> tuple[NDArray, Keep]:
        """Decide a stage, if it is one of the policy; ``Switchboard.decide_in_pass`` calls it."""
        decides = seen.stage in self._columns
        if decides:
            self._decide(seen)
        if self._resumption is not None:
            if decides:
                self._resumption.decided(self.decisions)
            self._resumption.keep(seen, self.keep)
        return self.decisions[:, self._passing[seen.stage]], self.keep if seen.stage == "first" else None

    def _decide(self, seen: PassState) -> None:
        columns, is_first = self._columns[seen.stage], seen.stage == "first"
        hidden, mask = self._first if is_first and self._first is not None else (seen.hidden.detach(), seen.mask)
        exits = self.decisions.copy()
        exits[:, columns.start : -1] = 1
        judged = np.zeros((len(exits), self._judges + self._answer_size), dtype=np.float32)
        if self._judges and not is_first:
            judged[:, 0] = self._judged(seen, exits)
        self._features = np.concatenate([pooled_features(hidden, mask).float().cpu().numpy(), judged], axis=1)
        if is_first and (of_tokens := self._policy.of_tokens) is not None:
            self._tokens = token_observations(hidden, mask, *of_tokens, self._policy.longest)
        decided = self._decided(seen.stage, exits)
        self.decisions[:, columns] = decided[:, columns]
        if is_first:
            self.decisions[:, -1] = decided[:, len(self._board)]
            self.keep, self._kept = self._keeps(self.decisions[:, -1])

    def _decided(self, stage: str, exits: NDArray) -> NDArray:
        """What the policy decides at a stage, ``[n, components]``, if the pass is to take what ``exits`` leaves."""
        policy = self._policy
        ranking = policy.ranking_flops(self._flops, self._length, self._kept < self._length)
        share = reading_ratio(self._head, self._flops, self._length, self._kept, exits[:, :-1], ranking)
        number = policy.network.stages.index(stage)
        shown = stage_observation(number, share, self._features, policy.mean, policy.deviation)
        return policy.network.decide({"stage": shown, **self._tokens} if self._tokens else shown)

    def _judged(self, seen: PassState, exits: NDArray) -> NDArray:
        """Log-odds of the head's answer if all is skipped from here on, ``[n]``."""
        confidence = self._head.confidence
        assert confidence is not None  # a head that judges has one
        with self._board.decide(exits[:, :-1], self.keep, resume_from=seen):
            return log_odds(confidence(self._judge()).double().detach().cpu().numpy())
