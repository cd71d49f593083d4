"""Passes in which a policy decides stage by stage; rows that go on wait, so that many of them run together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sd_gym.execution.passes import PASS_TOKENS, Passes
from sd_gym.execution.split import BackboneSplit
from sd_gym.inference.rollout import Keep, StagedRollout
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.observations import Observations
from sd_gym.switch import PassState, Switchboard
from sd_gym.switch.context import Block


class StagedPasses(Passes):
    """Passes of a split in which a policy decides stage by stage, or on its answers alone.

    Rows are grouped by length, and by their decisions if these are ``known`` before the passes. Few rows of a pass go
    on, and a pass of few rows takes nearly the time of one of many. So they wait for rows of other passes that go on
    from the same switch.
    """

    def __init__(
        self, split: BackboneSplit, policy: SkipPolicy, first_input: nn.Module | None = None, *, known: bool = False
    ) -> None:
        passes = split.passes  # without its bank: these run on the switchboard, so calls cost what they cost there
        super().__init__(split.backbone, split.instances, split.encoded, split.tokens, split.reading)
        self.most = passes.most
        self.max_target_length = passes.max_target_length
        self.watch = passes.watch
        # shared, as the split's costs count them
        self.generated = passes.generated
        self.finished = passes.finished
        self._policy = policy
        self._first_input = first_input
        self._known = known
        self.masks = np.zeros((len(split), len(self.backbone.board) + 1), dtype=np.int64)  # the policy's decisions
        self.went_on = np.zeros(len(split), dtype=np.bool_)  # which rows went on after their answer
        self.first_generated = self.generated.copy()

    def logits(self, rows: NDArray, decisions: NDArray) -> Iterator[tuple[NDArray, Tensor, Tensor]]:
        """Positions in ``rows``, final logits and labels, in parts; ``decisions``: zeros if they are not known."""
        waiting = _Waiting()
        for picked, inputs in self.planned(rows, decisions):
            given = dict(inputs)  # dropping tokens changes it
            rollout = self._rollout(rows[picked], given, partial(self.head.kept, given), decisions[picked])
            with rollout.deciding(inputs["attention_mask"]):
                logits = self.backbone.logits(given)
            if self._policy.has_answer_stage:
                rollout.answered(self.head.judge(logits))
            self._record(rows[picked], rollout)
            done = ~waiting.add(picked, rollout.resumable())
            if done.any():
                final = torch.from_numpy(np.flatnonzero(done)).to(logits.device)
                yield picked[done], logits.index_select(0, final), inputs["labels"].index_select(0, final)
            if waiting.tokens > PASS_TOKENS:
                yield from self._dense_logits(rows, waiting)
        yield from self._dense_logits(rows, waiting)

    def _dense_logits(self, rows: NDArray, waiting: "_Waiting") -> Iterator[tuple[NDArray, Tensor, Tensor]]:
        for picked, inputs, block in self._waiting_passes(rows, waiting):
            with block:
                logits = self.backbone.logits(inputs)
            yield picked, logits, inputs["labels"]

    @torch.inference_mode()
    def _texts(
        self, rows: NDArray, decisions: NDArray, resume_from: PassState | None, *, judges: bool
    ) -> tuple[list[str], NDArray]:
        """The final texts, and the judgement of the first ones, if the policy sees that.

        The policy alone says what is judged and where a pass goes on, so the last two arguments of ``Passes`` are not
        read.
        """
        texts, judged = np.empty(len(rows), dtype=object), np.empty((len(rows), len(self.head.judgement)))
        waiting = _Waiting()
        for picked, inputs in self.planned(rows, decisions, self.max_target_length):
            rollout = self._rollout(rows[picked], inputs, lambda keep: keep, decisions[picked])
            deciding = rollout.deciding(inputs["attention_mask"])
            texts[picked], judged[picked] = self._generated(
                rows[picked], inputs, deciding, judges=self._policy.has_answer_stage
            )
            if self._policy.has_answer_stage:
                rollout.answered(judged[picked])
            self._record(rows[picked], rollout)
            self.first_generated[rows[picked]] = self.generated[rows[picked]]
            waiting.add(picked, rollout.resumable())
            if waiting.tokens > PASS_TOKENS:
                self._write_dense(texts, rows, waiting)
        self._write_dense(texts, rows, waiting)
        return texts.tolist(), judged

    def _write_dense(self, texts: NDArray, rows: NDArray, waiting: "_Waiting") -> None:
        for picked, inputs, block in self._waiting_passes(rows, waiting, self.max_target_length):
            texts[picked], _ = self._generated(rows[picked], inputs, block, judges=False)

    def _waiting_passes(
        self, rows: NDArray, waiting: "_Waiting", steps: int = 0
    ) -> Iterator[tuple[NDArray, dict[str, Tensor], Block]]:
        """Positions in ``rows``, inputs and context manager of each pass, or ``generate()``, of rows that waited."""
        board, dense = self.backbone.board, np.zeros((1, len(self.backbone.board)), dtype=np.bool_)
        for start, positions, states in waiting.taken(board):
            runs = np.zeros((len(positions), len(board) + 1), dtype=np.int64)
            runs[:, :start] = 1
            for part, inputs in self.planned(rows[positions], runs, steps):
                state = _joined(states, part, inputs["input_ids"].shape[1], self.head.padding_side) if states else None
                yield positions[part], inputs, board.decide(dense, resume_from=state)

    def observe_first(self, rows: NDArray, hidden: Tensor, mask: Tensor) -> Observations:
        """What the policy observes of rows before the first layer, whose input ``hidden`` is ``[n, length, width]``."""
        return self._rollout(rows, {}, lambda keep: keep, None).observe_first(hidden, mask)

    def rejected(self, rows: NDArray, masks: NDArray, judged: NDArray, hidden: Tensor, mask: Tensor) -> NDArray:
        """Which rows go on after their answers under masks ``[n, switches + 1]``, bool ``[n]``.

        ``judged``: the head's judgement, ``[n, values]``; ``hidden`` and ``mask`` as of ``observe_first``.
        """
        rollout = self._rollout(rows, {}, lambda keep: keep, None)
        rollout.observe_first(hidden, mask)
        rollout.decisions = masks
        rollout.answered(judged)
        return rollout.went_on

    def _rollout(
        self, rows: NDArray, inputs: dict[str, Tensor], in_pass: Callable[[NDArray], Keep], decisions: NDArray | None
    ) -> StagedRollout:
        """Decides in a pass on these rows; ``in_pass`` maps the input's tokens that stay to those of the pass."""
        board, length = self.backbone.board, self.encoded.source_length[rows]

        def keeps(level: NDArray) -> tuple[Keep, NDArray]:
            keep = self._tokens.kept(rows, level)
            return None if keep is None else in_pass(keep), self._tokens.kept_length(rows, level)

        first = None
        if self._first_input is not None:
            shown = self.encoded.inputs(rows, self.backbone.model.device)
            first = self._first_input(**shown), shown["attention_mask"]
        model, judge = (board, self.head, self.backbone.flops), partial(self.backbone.logits, inputs)
        known = decisions if self._known else None
        return StagedRollout(self._policy, *model, length, keeps, judge, first, known)

    def _record(self, rows: NDArray, rollout: StagedRollout) -> None:
        self.masks[rows], self.went_on[rows] = rollout.decisions, rollout.went_on


class _Waiting:
    """Rows that go on, by the stage from which they do (``None``: from the start), with their states there."""

    def __init__(self) -> None:
        self.tokens = 0  # padded tokens of the states that are held, and of their keys and values
        self._parts: dict[str | None, list[tuple[NDArray, PassState | None]]] = {}

    def add(self, positions: NDArray, parts: Iterable[tuple[NDArray, PassState | None]]) -> NDArray:
        """Let parts of a pass on ``positions`` wait; returns which of its rows wait, bool ``[rows]``."""
        waits = np.zeros(len(positions), dtype=np.bool_)
        for rows, state in parts:
            waits[rows] = True
            self._parts.setdefault(None if state is None else state.stage, []).append((positions[rows], state))
            self.tokens += 0 if state is None else state.size
        return waits

    def taken(self, board: Switchboard) -> Iterator[tuple[int, NDArray, list[PassState]]]:
        """For each switch from which rows go on: it, their positions and states; then none of them waits any more."""
        held = self._parts
        self._parts = {}
        self.tokens = 0
        for stage, parts in held.items():
            start = 0 if stage is None else board.decided_at([stage])[stage].start
            positions = np.concatenate([own for own, _ in parts])
            yield start, positions, [state for _, state in parts if state is not None]


def _joined(states: Sequence[PassState], rows: NDArray, length: int, side: str) -> PassState:
    """The state of some ``rows`` of all these states, padded to a ``length`` at a ``side``."""
    ends = np.cumsum([len(state.hidden) for state in states])
    owner, parts = np.searchsorted(ends, rows, side="right"), []
    for number in np.unique(owner):
        state = states[number]
        own = rows[owner == number] - (ends[number] - len(state.hidden))
        parts.append(state.rows(torch.from_numpy(own).to(state.hidden.device)).padded(length, side))
    order = torch.from_numpy(np.argsort(np.argsort(owner, kind="stable"))).to(states[0].hidden.device)
    return PassState.joined(parts).rows(order)
