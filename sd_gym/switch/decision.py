"""A decision in force: which rows of a batch run which sublayer, and the state of a forward pass under it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import local
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.checkpoint
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from sd_gym.switch.cache import held_keys
from sd_gym.switch.stages import PassState, Stage
from sd_gym.switch.tokens import DroppedTokens, TokenPass

_CHECKPOINT = torch.utils.checkpoint.__file__


class Call(NamedTuple):
    """What the first module of a sublayer passes to its later modules."""

    hidden: Tensor  # the branch's input, all rows
    rows: Tensor | None  # rows that run; None: all
    drops: bool  # whether it attends to an input from which tokens are dropped


class Pass(local):
    """The state of a forward pass that modules share; each thread has its own."""

    tokens: TokenPass  # set before the first layer, where tokens are dropped

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}  # calls of running sublayers, by index of the switch
        # The encoder's output, row indices and the rows selected, by index of the switch.
        self.sources: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.encoded: Tensor | None = None  # the encoder's output, in a decoder that has a stage


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows of a batch run which sublayer. It holds no state of a pass, so it can be reused."""

    batch: int  # rows that are decided on; 1 stands for all rows of any batch
    tag: bytes  # identifies the decision
    rows: list[Tensor | None]  # rows that run, int64 ``[kept]``, by switch; ``None``: all
    # ``rows``, by how often ``generate()`` repeats each row, and by device.
    copies: dict[tuple[int, torch.device], list[Tensor | None]]
    empty: frozenset[int]  # indices of the switches that no row runs
    idle: frozenset[tuple[str, int]]  # stack and index of each layer that is skipped as a whole
    needs: tuple[int, ...]  # indices of the patches that it needs

    @classmethod
    def of(cls, skip: NDArray, idle: frozenset[tuple[str, int]], needs: tuple[int, ...], device: torch.device) -> Plan:
        """The plan of ``skip``, bool ``[batch, switches]``; all row indices go to the device in one transfer."""
        runs = np.ascontiguousarray(~skip.T)
        counts = runs.sum(axis=1)
        mixed = np.flatnonzero((counts > 0) & (counts < len(skip)))
        with torch.inference_mode(False):  # when it is reused, gradients may be needed
            indices = torch.from_numpy(np.nonzero(runs[mixed])[1]).to(device)
            parts = indices.split([*counts[mixed].tolist(), 0])  # the last part is for switches that no row runs
        rows: list[Tensor | None] = [None if count else parts[-1] for count in counts.tolist()]
        for index, part in zip(mixed.tolist(), parts, strict=False):
            rows[index] = part
        empty = frozenset(np.flatnonzero(counts == 0).tolist())
        return cls(len(skip), skip.tobytes(), rows, {(1, device): rows}, empty, idle, needs)

    def repeated(self, repeats: int, device: torch.device) -> list[Tensor | None]:
        """``rows`` of a batch in which each row is repeated, on a device."""
        key = repeats, device
        if key not in self.copies:
            with torch.inference_mode(False):
                beams = torch.arange(repeats, device=device)
                self.copies[key] = [
                    None if rows is None else (rows.to(device)[:, None] * repeats + beams).flatten()
                    for rows in self.rows
                ]
        return self.copies[key]


@dataclass(frozen=True, eq=False)
class PendingDecision:
    """The part of a decision that is still to be made during the pass."""

    stages: tuple[Stage, ...]  # the stages where it is made, the next one first
    # Maps the pass's state to the decisions of the stage's switches and the tokens that are kept.
    choose: Callable[[PassState], tuple[Tensor | NDArray, Tensor | NDArray | None]]
    mask: Tensor | None  # mask of the input's tokens, ``[batch, length]``; ``None``: no padding
    skip: NDArray  # decisions so far, bool ``[batch, switches]``; switches that are not yet decided run
    # ``settle(decision, hidden, cache)`` makes the next stage's decision, puts it in force and returns it.
    settle: Callable[[Decision, Tensor, Cache | None], Decision | None]
    needs: tuple[int, ...]  # indices of the patches that it needs

    def state(self, decision: Decision, hidden: Tensor, cache: Cache | None) -> PassState:
        """The pass's state at the next stage, a row for each input, whose beams or samples are the same."""
        stage, encoded, tokens, repeats = self.stages[0], decision.state.encoded, decision.tokens, decision.repeats
        keys = held_keys(cache, stage.place[1], repeats) if decision.generating else None
        if repeats > 1:
            hidden, encoded = hidden[::repeats], None if encoded is None else encoded[::repeats]
        if stage.follows_encoder and not stage.is_between:
            mask = hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
            mask[:, :1] = 1
        else:
            mask = self._mask(hidden, tokens)
        return PassState(stage.name, hidden, mask, encoded, keys)

    def is_at(self, place: tuple[str, int]) -> bool:
        """Whether the next stage is right before this layer."""
        return self.stages[0].place == place and not self.stages[0].is_between

    def merged(self, skip: NDArray) -> NDArray:
        """Decisions so far with those of the next stage, ``skip``: bool ``[batch, switches]``."""
        if 1 not in (len(skip), len(self.skip)) and len(skip) != len(self.skip):
            raise ValueError(
                f"stage {self.stages[0].name!r} decides on {len(skip)} rows, but earlier stages decided on "
                f"{len(self.skip)}; give one row per row of the batch, or a single row for all"
            )
        if skip.shape[1] == self.skip.shape[1]:  # this stage decides all switches
            return skip
        merged = self.skip.repeat(len(skip), axis=0) if len(self.skip) == 1 else self.skip.copy()
        merged[:, self.stages[0].switches] = skip
        return merged

    def _mask(self, hidden: Tensor, tokens: DroppedTokens | None) -> Tensor:
        """The mask of the input's tokens, with 0 at later positions."""
        batch, length = len(hidden), hidden.shape[1] if tokens is None else tokens.length
        mask = None if self.mask is None else self.mask.to(hidden.device)
        if mask is None:
            mask = hidden.new_ones((batch, length), dtype=torch.long)
        elif mask.ndim != 2 or len(mask) != batch or mask.shape[1] > length:
            raise ValueError(
                f"the mask must have a column for each of the input's tokens, [{batch}, {length}] or narrower where an "
                f"answer follows; got {list(mask.shape)}"
            )
        elif mask.shape[1] < length:
            mask = torch.cat([mask, mask.new_zeros(batch, length - mask.shape[1])], dim=1)
        if tokens is None:
            return mask
        index, valid = tokens.view(hidden)
        return mask.gather(1, index) * valid


@dataclass(eq=False)
class Decision:
    """The decisions of a batch, in force."""

    plan: Plan  # which rows run which sublayer
    tokens: DroppedTokens | None  # ``None``: no token is dropped
    pending: PendingDecision | None = None  # the part that is still to be decided during the pass
    resume_from: PassState | None = None  # the state that the pass is resumed from; ``None``: it runs from the start
    # Stack and index of the layer that takes the hidden states of ``resume_from`` instead of its own.
    resumes: tuple[str, int] | None = None
    generating: bool = False  # whether it is for one call of ``generate()``
    repeats: int = 1  # how often ``generate()`` repeats each row, for its beams or samples
    replays: int = 0  # calls of ``torch.utils.checkpoint`` around the block that put it in force
    state: Pass = field(default_factory=Pass)
    tag_cell: list[bytes] = field(default_factory=list)  # holds ``plan.tag``; all stages share the list

    def __post_init__(self) -> None:
        self.tag_cell[:] = [self.plan.tag]

    @property
    def needs(self) -> tuple[int, ...]:
        """Indices of the patches that it needs."""
        return self.plan.needs if self.pending is None else (*self.plan.needs, *self.pending.needs)

    @property
    def tag(self) -> tuple[list[bytes], int, bytes]:
        """Identifies a cache that is filled under this decision; later stages change it in place."""
        return self.tag_cell, self.repeats, self.tokens.tag if self.tokens is not None else b""

    @property
    def is_uniform(self) -> bool:
        """Whether it is the same for all rows of any batch."""
        return self.plan.batch == 1 and self.tokens is None

    def check(self, total: int) -> None:
        """Raise an error if a batch of ``total`` rows cannot run under this decision, in which some row skips."""
        self.refuse_replays()
        if not self.is_uniform:
            self.refuse_tracing()
            self.repeats_in(total)

    def refuse_tracing(self) -> None:
        """Raise ``NotImplementedError`` if a trace or export would keep the decisions of these rows."""
        if not self.is_uniform and (is_tracing() or torch.compiler.is_exporting()):
            raise NotImplementedError(
                f"a traced or exported model would keep the decisions of these {self.plan.batch} rows for any batch; "
                "trace it densely, or under a single row of decisions, which stands for all, without dropped tokens"
            )

    def refuse_replays(self) -> None:
        """Raise ``NotImplementedError`` if the backward pass would run this code again without the decision."""
        if torch.compiler.is_dynamo_compiling() or self.generating or torch.is_inference_mode_enabled():
            return
        if replays(sys._getframe(1)) > self.replays:
            raise NotImplementedError(
                "gradient checkpointing (torch.utils.checkpoint) runs layers again in the backward pass, where this "
                "decision is not in force; call model.gradient_checkpointing_disable(), or decide inside of the "
                "function that is checkpointed"
            )

    def after_stage(self, plan: Plan, tokens: DroppedTokens | None, pending: PendingDecision | None) -> Decision:
        """The decision after a stage, for the rest of the same pass."""
        same = self.resume_from, self.resumes, self.generating, self.repeats, self.replays, self.state, self.tag_cell
        return Decision(plan, tokens, pending, *same)  # faster than dataclasses.replace, which slows small models

    def resumed(self, hidden: Tensor) -> Tensor:
        """The hidden states that a layer takes instead of its own, where the pass is resumed."""
        state = self.resume_from
        assert state is not None  # only called for a resumed pass
        resumed = state.hidden if self.repeats == 1 else state.hidden.repeat_interleave(self.repeats, dim=0)
        if resumed.shape != hidden.shape:
            raise ValueError(
                f"cannot resume at {state.stage!r}: the stopped pass had hidden states {list(state.hidden.shape)}, "
                f"this one has {list(hidden.shape)}; pass the same inputs and the same keep as before"
            )
        return resumed

    def repeats_in(self, total: int) -> int:
        """How often each row is repeated in a batch of ``total``; ``ValueError`` if that is another batch."""
        batch = self.plan.batch
        if batch == 1 or total == batch * self.repeats:
            return 1 if batch == 1 else self.repeats
        raise ValueError(
            f"decisions are in force for {batch} rows, but the model got {total}; give one row of decisions per row of "
            "the batch, in its order, or a single row for all (only in generate() does a row stand for its beams)"
        )

    def rows_of(self, number: int, hidden: Tensor) -> Tensor | None:
        """Rows of the batch ``hidden`` that run switch ``number``, on its device; ``None``: all."""
        return self.plan.repeated(self.repeats_in(hidden.shape[0]), hidden.device)[number]


def replays(frame: FrameType | None) -> int:
    """The number of ``torch.utils.checkpoint`` calls that a frame is inside of."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == _CHECKPOINT
        frame = frame.f_back
    return count


def refuse_compiled() -> None:
    """Raise ``NotImplementedError`` if the pass is compiled, traced or exported."""
    if torch.compiler.is_compiling() or is_tracing():
        raise NotImplementedError("a compiled, traced or exported model cannot decide in the pass; use decide()")


def is_tracing() -> bool:
    """Whether ``torch.jit`` traces the pass."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  (documented, but not in __all__)
