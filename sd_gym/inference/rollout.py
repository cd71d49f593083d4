"""A policy with several stages in one forward pass: its observations and decisions at each stage."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.heads import Head, reading_ratio
from sd_gym.going_on import ANSWER
from sd_gym.inference.resumption import Resumption
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.features import log_odds, pooled_features, stage_observation, token_observations
from sd_gym.policy.observations import Observations
from sd_gym.switch import FlopsModel, PassState, Switchboard
from sd_gym.switch.context import Block

Keep = NDArray | Tensor | None  # which tokens stay, [n, length]; None: all


class StagedRollout:
    """Decides during a pass, stage by stage, and on its answer.

    The pass runs inside of ``deciding``. With the stage ``answer``, ``answered`` then decides which rows go on, and
    ``going_on`` runs these again from their first skipped sublayer.

    Args:
        policy: A policy with several stages.
        board, head, flops: Those of the model.
        length: Tokens of each input, int ``[n]``.
        keeps: From token levels ``[n]`` to the tokens that the pass keeps, and their number for each input.
        judge: Runs the pass again for its logits ``[n, classes]``, where the head judges the output of a layer.
        first: Hidden states and mask that are observed before the first layer, if not those of the pass itself.
        known: The masks of a policy that ``decides_first``, int ``[n, switches + 1]``; ``None``: it decides here.
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
        known: NDArray | None = None,
    ) -> None:
        self._policy = policy
        self._board = board
        self._head = head
        self._flops = flops
        self._length = length
        self._keeps = keeps
        self._judge = judge
        self._first = first
        self._known = known
        self._judges = head.can_exit(board)
        self._answer_size = len(head.judgement) * policy.has_answer_stage
        self._columns = board.decided_at(policy.stages_of_pass)
        self._passing = self._columns  # the switches of each stage at which the pass stops
        self._resumption: Resumption | None = None
        if policy.has_answer_stage:
            decided = [columns.start for columns in self._columns.values()]
            self._resumption = Resumption(board, head.resume_points(board), decided)
            self._passing = board.decided_at([*self._columns, *self._resumption.stages])
        self.decisions = np.zeros((len(length), len(board) + 1), dtype=np.int64)  # the masks so far
        self.keep: Keep = None  # which tokens stay
        self.went_on = np.zeros(len(length), dtype=np.bool_)  # which rows go on
        self._kept = length
        self._features = np.zeros((0, 0), dtype=np.float32)  # features at the last stage
        self._tokens: dict[str, NDArray] = {}  # if the policy observes them

    def deciding(self, mask: Tensor) -> Block:
        """The context manager for the pass; ``mask`` of the input's tokens, ``[n, length]``."""
        return self._board.decide_in_pass(self._choose, list(self._passing), mask)

    def observe_first(self, hidden: Tensor, mask: Tensor) -> Observations:
        """What the policy observes before the first layer, whose input ``hidden`` is ``[n, length, width]``."""
        return self._observe(PassState("first", hidden, mask))

    def answered(self, judged: Tensor | NDArray) -> None:
        """Decide, by the head's judgement ``[n, values]``, which rows go on."""
        values = torch.as_tensor(judged).detach().cpu().numpy()
        self._features[:, self._features.shape[1] - self._answer_size :] = values
        rejected = self._policy.network.decide(self._observed(ANSWER, self.decisions))[:, -1] == 1
        self.went_on = rejected & self.decisions.any(axis=1)  # rows that skipped nothing have nothing left to run

    def resumable(self) -> Iterator[tuple[NDArray, PassState | None]]:
        """Parts of the rows that go on after skipping, int64 ``[rows]``, each with the state from which they do.

        ``None``: from the start.
        """
        return iter(()) if self._resumption is None else self._resumption.parts(self.went_on)

    def going_on(self) -> Iterator[tuple[Tensor, Block]]:
        """Parts of the rows that go on after skipping, int64 ``[rows]``, each with the context manager for its pass."""
        dense = np.zeros((1, len(self._board)), dtype=np.bool_)
        for rows, state in self.resumable():
            yield torch.from_numpy(rows), self._board.decide(dense, resume_from=state)

    def _choose(self, state: PassState) -> tuple[NDArray, Keep]:
        """Decide if the stage is one of the policy's; ``Switchboard.decide_in_pass`` calls it."""
        if state.stage in self._columns:
            self._decide(state)
        if self._resumption is not None:
            self._resumption.store(state, self.decisions, self.keep)
        return self.decisions[:, self._passing[state.stage]], self.keep if state.stage == "first" else None

    def _decide(self, state: PassState) -> None:
        columns, observed = self._columns[state.stage], self._observe(state)
        decided = self._policy.network.decide(observed) if self._known is None else self._known
        self.decisions[:, columns] = decided[:, columns]
        if state.stage == "first":
            self.decisions[:, -1] = decided[:, len(self._board)]
            self.keep, self._kept = self._keeps(self.decisions[:, -1])

    def _observe(self, state: PassState) -> Observations:
        """What the policy observes at a stage of the pass."""
        is_first = state.stage == "first"
        hidden, mask = self._first if is_first and self._first is not None else (state.hidden.detach(), state.mask)
        exits = self.decisions.copy()
        exits[:, self._columns[state.stage].start : -1] = 1
        judged = np.zeros((len(exits), self._judges + self._answer_size), dtype=np.float32)
        if self._judges and not is_first:
            confidence = self._head.confidence
            assert confidence is not None  # every head that judges has it
            with self._board.decide(exits[:, :-1], self.keep, resume_from=state):
                judged[:, 0] = log_odds(confidence(self._judge()).detach().cpu().double().numpy())
        self._features = np.concatenate([pooled_features(hidden, mask).cpu().numpy(), judged], axis=1)
        if is_first and (token_statistics := self._policy.token_statistics) is not None:
            self._tokens = token_observations(hidden, mask, *token_statistics, self._policy.max_source_length)
        return self._observed(state.stage, exits)

    def _observed(self, stage: str, exits: NDArray) -> Observations:
        """The observation at a stage; ``exits``: the masks ``[n, switches + 1]`` if all the rest is skipped."""
        policy = self._policy
        ranking = policy.ranking_flops(self._flops, self._length, self._kept < self._length)
        share = reading_ratio(self._head, self._flops, self._length, self._kept, exits[:, :-1], ranking)
        number = policy.network.stages.index(stage)
        observed = stage_observation(number, share, self._features, policy.mean, policy.deviation)
        return {"stage": observed, **self._tokens} if self._tokens else observed
