"""A decision in force: which rows of a batch run which sublayer, and what one forward pass under it remembers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from threading import local
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.switch.tokens import DroppedTokens, TokenPass


@dataclass(frozen=True)
class Look:
    """In the place of a decision: nothing is skipped, and the pass ends where the first layer begins.

    Attributes:
        needs: Numbers of the shadows that it needs.
    """

    needs: tuple[int, ...]


class Reached(Exception):  # noqa: N818  (no error: it ends the pass on purpose)
    """What a pass is looked at for was reached; carries it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


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
    """

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.sources: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.tokens: TokenPass | None = None


@dataclass(eq=False)
class Decision:
    """The decisions of a batch.

    Attributes:
        batch: Rows that are decided on; 1 stands for all rows of any batch.
        columns: Which rows run, by switch, on the host.
        rows: Rows that run, int64 ``[kept]`` on the model's device, by switch; ``None``: all. By how often
            ``generate()`` repeats each row.
        tokens: The tokens that are dropped; ``None``: none.
        needs: Numbers of the shadows that it needs.
        generating: Whether this is for one call of ``generate()``.
        repeats: How often that repeats each row, for its beams or samples; 1 before and anywhere else.
        state: What a pass remembers.
    """

    batch: int
    columns: list[bytes]
    rows: dict[int, list[Tensor | None]]
    tokens: DroppedTokens | None
    needs: list[int]
    generating: bool = False
    repeats: int = 1
    state: Pass = field(default_factory=Pass)

    @classmethod
    def of(cls, skip: NDArray, tokens: DroppedTokens | None, needs: list[int], device: torch.device) -> Decision:
        """The decisions ``skip``, bool ``[batch, switches]``: one transfer to the device for all rows."""
        runs = np.ascontiguousarray(~skip.T)
        counts = runs.sum(axis=1)
        rows = torch.from_numpy(np.nonzero(runs)[1]).to(device).split(counts.tolist())
        rows = [None if count == len(skip) else kept for count, kept in zip(counts, rows, strict=True)]
        return cls(len(skip), [column.tobytes() for column in runs], {1: rows}, tokens, needs)

    @property
    def is_uniform(self) -> bool:
        """Whether it says the same of all rows of any batch."""
        return self.batch == 1 and self.tokens is None

    def refuse_tracing(self) -> None:
        """Raise NotImplementedError where the model is traced or exported under what holds for these rows alone."""
        if (torch.jit.is_tracing() or torch.compiler.is_exporting()) and not self.is_uniform:
            raise NotImplementedError(
                f"a traced or exported model would keep the decisions of these {self.batch} rows for any batch; trace "
                "it under a single row of decisions without dropped tokens, which stands for all, or densely"
            )

    def for_generating(self) -> Decision:
        """The same decisions for one call of ``generate()``."""
        return replace(self, generating=True, repeats=1, state=Pass())

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
        repeats = self.repeats_in(total)
        if repeats not in self.rows:
            self.rows[repeats] = [_repeated(rows, repeats) for rows in self.rows[1]]
        return self.rows[repeats][number]

    def mark(self, number: int, tokens: bool) -> tuple[bytes, int, bytes]:
        """What tells a cache that is filled under this decision from others.

        Args:
            number: The switch.
            tokens: Whether dropped tokens are missing from what it stores.
        """
        return self.columns[number], self.repeats, self.tokens.mark if tokens else b""


def _repeated(rows: Tensor | None, repeats: int) -> Tensor | None:
    if rows is None:
        return None
    return (rows[:, None] * repeats + torch.arange(repeats, device=rows.device)).flatten()
