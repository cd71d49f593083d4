"""A decision in force: which rows of a batch run which sublayer, and what one forward pass under it remembers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from threading import local
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.checkpoint
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from sd_gym.switch.stages import Choice, Seen
from sd_gym.switch.tokens import DroppedTokens, TokenPass

_CHECKPOINT = torch.utils.checkpoint.__file__


class Call(NamedTuple):
    """What a sublayer's first module leaves to the others of the same forward pass."""

    hidden: Tensor  # the branch's input, all rows
    rows: Tensor | None  # that run; None: all


class Pass(local):
    """What a forward pass remembers from module to module; each thread has its own.

    Attributes:
        calls: By number of the switch, while its sublayer runs.
        sources: Rows of the encoder's output ``(output, rows, taken)``, by number of the switch.
        tokens: What is left of the input where tokens are dropped.
        encoded: The encoder's output, in a decoder that has a stage.
    """

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.sources: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.tokens: TokenPass | None = None
        self.encoded: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows of a batch run which sublayer. It may be used again: nothing in it is of one pass.

    Attributes:
        batch: Rows that are decided on; 1 stands for all rows of any batch.
        mark: What tells its decisions from others.
        rows: Rows that run, int64 ``[kept]`` on the model's device, by switch; ``None``: all. By how often
            ``generate()`` repeats each row.
        empty: Numbers of the switches that no row runs.
        idle: Stack and index of each layer that no row needs, and that can be passed by as a whole.
        needs: Numbers of the shadows that it needs.
    """

    batch: int
    mark: bytes
    rows: dict[int, list[Tensor | None]]
    empty: frozenset[int]
    idle: frozenset[tuple[str, int]]
    needs: tuple[int, ...]

    @classmethod
    def of(cls, skip: NDArray, idle: frozenset[tuple[str, int]], needs: tuple[int, ...], device: torch.device) -> Plan:
        """The plan of ``skip``, bool ``[batch, switches]``: one transfer to the device for all rows."""
        runs = np.ascontiguousarray(~skip.T)
        counts = runs.sum(axis=1)
        mixed = np.flatnonzero((counts > 0) & (counts < len(skip)))
        with torch.inference_mode(False):  # gradients may be asked for when it is used again
            taken = torch.from_numpy(np.nonzero(runs[mixed])[1]).to(device)
            parts = taken.split([*counts[mixed].tolist(), 0])  # the last one for those that no row runs
        rows: list[Tensor | None] = [None if count else parts[-1] for count in counts.tolist()]
        for number, kept in zip(mixed.tolist(), parts, strict=False):
            rows[number] = kept
        empty = frozenset(np.flatnonzero(counts == 0).tolist())
        return cls(len(skip), skip.tobytes(), {1: rows}, empty, idle, needs)

    def repeated(self, repeats: int) -> list[Tensor | None]:
        """``rows`` where each row of the batch stands so many times."""
        if repeats not in self.rows:
            with torch.inference_mode(False):
                self.rows[repeats] = [_repeated(rows, repeats) for rows in self.rows[1]]
        return self.rows[repeats]


@dataclass(eq=False)
class Decision:
    """The decisions of a batch, in force.

    Attributes:
        plan: Which rows run which sublayer.
        tokens: The tokens that are dropped; ``None``: none.
        choice: What is still to be decided in the pass; until then it runs.
        behind: What the pass is resumed from; ``None``: nothing, it runs as a whole.
        resumes: Stack and index of the layer that takes the hidden states of ``behind`` in the place of its own.
        generating: Whether this is for one call of ``generate()``.
        repeats: How often that repeats each row, for its beams or samples; 1 before and anywhere else.
        replays: Calls of ``torch.utils.checkpoint`` that it was put in force inside of.
        state: What a pass remembers.
        signature: One element, ``plan.mark``; of a decision that grows, the same list from stage to stage.
    """

    plan: Plan
    tokens: DroppedTokens | None
    choice: Choice | None = None
    behind: Seen | None = None
    resumes: tuple[str, int] | None = None
    generating: bool = False
    repeats: int = 1
    replays: int = 0
    state: Pass = field(default_factory=Pass)
    signature: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.signature[:] = [self.plan.mark]

    @property
    def batch(self) -> int:
        """Rows that are decided on; 1 stands for all rows of any batch."""
        return self.plan.batch

    @property
    def needs(self) -> tuple[int, ...]:
        """Numbers of the shadows that it needs."""
        return self.plan.needs if self.choice is None else (*self.plan.needs, *self.choice.needs)

    @property
    def mark(self) -> tuple[list[bytes], int, bytes]:
        """What tells a cache that is filled under this decision from others; it grows with the decision."""
        return self.signature, self.repeats, self.tokens.mark if self.tokens is not None else b""

    @property
    def is_uniform(self) -> bool:
        """Whether it says the same of all rows of any batch."""
        return self.batch == 1 and self.tokens is None

    def check(self, total: int) -> None:
        """Raise what there is to raise where a sublayer begins that some row of a batch of ``total`` skips.

        Raises:
            ValueError: As ``repeats_in``.
            NotImplementedError: As ``refuse_replays`` and ``refuse_tracing``.
        """
        self.refuse_replays()
        if not self.is_uniform:
            self.refuse_tracing()
            self.repeats_in(total)

    def refuse_tracing(self) -> None:
        """Raise NotImplementedError where the model is traced or exported under what holds for these rows alone."""
        if not self.is_uniform and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            raise NotImplementedError(
                f"a traced or exported model would keep the decisions of these {self.batch} rows for any batch; trace "
                "it under a single row of decisions without dropped tokens, which stands for all, or densely"
            )

    def refuse_replays(self) -> None:
        """Raise NotImplementedError where what runs now runs again in the backward pass, without the decision."""
        if torch.compiler.is_dynamo_compiling() or self.generating or torch.is_inference_mode_enabled():
            return
        if replays(sys._getframe(1)) > self.replays:
            raise NotImplementedError(
                "gradient checkpointing (torch.utils.checkpoint) runs layers again in the backward pass, where no "
                "decision is in force, or another one; call model.gradient_checkpointing_disable(), decide inside of "
                "the function that is checkpointed, or decide nothing"
            )

    def for_generating(self) -> Decision:
        """The same decisions for one call of ``generate()``."""
        return replace(self, generating=True, repeats=1, state=Pass(), signature=[])

    def grown(self, plan: Plan, tokens: DroppedTokens | None, choice: Choice | None) -> Decision:
        """What is decided behind a stage, for the rest of the same pass."""
        held = self.behind, self.resumes, self.generating, self.repeats, self.replays, self.state, self.signature
        return Decision(plan, tokens, choice, *held)  # dataclasses.replace would be seen in a small model's time

    def is_at(self, place: tuple[str, int], *, between: bool = False) -> bool:
        """Whether the next stage stands in front of this layer, or between the encoder and this layer."""
        if self.choice is None:
            return False
        stage = self.choice.stages[0]
        return stage.place == place and stage.is_between == between

    def resumed(self, hidden: Tensor) -> Tensor:
        """The hidden states that a layer takes where the pass is resumed.

        Args:
            hidden: What takes their place up to there.

        Raises:
            ValueError: If the pass is of another batch.
        """
        if self.behind.hidden.shape != hidden.shape:
            raise ValueError(
                f"the pass that is resumed at {self.behind.stage!r} was stopped with hidden states "
                f"{list(self.behind.hidden.shape)}, but this one has {list(hidden.shape)}; give the model the inputs, "
                "and the board the tokens, that it was stopped with"
            )
        return self.behind.hidden

    def settled(self, hidden: Tensor, cache: Cache | None) -> Decision | None:
        """The decision that the pass goes on under, behind a stage that it has reached.

        Args:
            hidden: What enters the layer, or the encoder's output.
            cache: The model's cache, if it has one.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise NotImplementedError("a compiled, traced or exported model cannot decide in the pass; use decide()")
        return self.choice.settle(self, hidden, cache)

    def repeats_in(self, total: int) -> int:
        """How often each row stands in a batch of ``total``.

        Raises:
            ValueError: If the batch is not the one that was decided on.
        """
        if self.batch == 1 or total == self.batch * self.repeats:
            return 1 if self.batch == 1 else self.repeats
        raise ValueError(
            f"decisions are in force for {self.batch} rows, but the model got {total}; give a row of decisions for "
            "each row of the batch, in its order, or a single one for all (only in generate() does a row stand for its "
            "beams and samples)"
        )

    def rows_of(self, number: int, total: int) -> Tensor | None:
        """Rows of a batch of ``total`` that run switch ``number``; ``None``: all.

        Raises:
            ValueError: As ``repeats_in``.
        """
        return self.plan.repeated(self.repeats_in(total))[number]


InForce = Decision | None  # what a block puts in force; None: everything runs


def replays(frame: FrameType | None) -> int:
    """Calls of ``torch.utils.checkpoint`` that the code in a frame runs inside of."""
    found = 0
    while frame is not None:
        found += frame.f_code.co_filename == _CHECKPOINT
        frame = frame.f_back
    return found


def _repeated(rows: Tensor | None, repeats: int) -> Tensor | None:
    if rows is None:
        return None
    return (rows[:, None] * repeats + torch.arange(repeats, device=rows.device)).flatten()
