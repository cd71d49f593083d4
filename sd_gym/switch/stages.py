"""Stages: the points of a forward pass where it can be looked at, and the switches from there on be decided.

A decision that is made in the pass grows from stage to stage. What a pass has computed up to a stage is kept as
``Seen``, from which it can be resumed under other decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from sd_gym.switch.switch import Switch

if TYPE_CHECKING:
    from sd_gym.switch.decision import Decision
    from sd_gym.switch.tokens import DroppedTokens

EVERY_LAYER = "every_layer"  # stands for all stages of a backbone
BETWEEN = "decoder"  # the stage between encoder and decoder
MIDDLE = "middle"  # stands for the layer in the middle of the first stack


@dataclass(frozen=True, eq=False)
class Seen:
    """What a pass shows at a stage, and all that it can be resumed from.

    Attributes:
        stage: Name of the stage.
        hidden: Hidden states that enter the layer, ``[batch, positions, width]``, without dropped tokens; at
            ``decoder`` the encoder's output.
        mask: Which positions are to be looked at, ``[batch, positions]``: the input's tokens, neither padding nor an
            answer behind a prompt. Of a decoder behind an encoder the first position alone, which is all that
            ``generate()`` has when it decides.
        encoded: At the decoder's stages, the encoder's output ``[batch, source, width]``; else ``None``.
    """

    stage: str
    hidden: Tensor
    mask: Tensor
    encoded: Tensor | None = None

    def rows(self, picked: Tensor) -> Seen:
        """Some rows of it, by indices int64 ``[rows]``, to resume those alone.

        They keep the padding of the batch that they come from.
        """
        encoded = None if self.encoded is None else self.encoded.index_select(0, picked)
        return replace(
            self, hidden=self.hidden.index_select(0, picked), mask=self.mask.index_select(0, picked), encoded=encoded
        )


class Reached(Exception):  # noqa: N818  (no error: it ends the pass on purpose)
    """What a pass is run for was reached; carries it."""

    def __init__(self, value: Seen | Tensor) -> None:
        self.value = value


class Stage(NamedTuple):
    """A point of the forward pass.

    Attributes:
        name: ``first``, ``decoder``, or stack and index of a layer.
        place: Stack and index of the layer that it stands in front of.
        switches: Those that are decided there: up to the next stage, or, of one by itself, up to the next layer's.
        follows_encoder: Whether it stands in the decoder behind an encoder, or between the two.
    """

    name: str
    place: tuple[str, int]
    switches: slice
    follows_encoder: bool

    @property
    def is_between(self) -> bool:
        """Whether it stands between encoder and decoder, and shows the encoder's output."""
        return self.follows_encoder and self.place[1] == 0


def stages_of(switches: Sequence[Switch]) -> list[Stage]:
    """All stages of a backbone, in execution order, from its switches."""
    stages: list[Stage] = []
    places = [(switch.stack, switch.index) for switch in switches]
    for number, (place, switch) in enumerate(zip(places, switches, strict=True)):
        if number and place == places[number - 1]:
            continue
        name = f"{place[0]}.{place[1]}"
        if place[1] == 0:
            name = "first" if number == 0 else place[0]
        stages.append(Stage(name, place, slice(number, number + places.count(place)), not switch.reads_input))
    return stages


def stages_named(known: Sequence[Stage], names: Sequence[str]) -> tuple[Stage, ...]:
    """The named stages in execution order, each with the switches up to the next one.

    Args:
        known: All stages of the backbone.
        names: The names; ``every_layer`` stands for all, ``middle`` for the layer in the middle of the first stack.

    Raises:
        ValueError: If there is no name, or one that the backbone does not have.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"stages must be a list of one or more names, such as ['first']; got {names!r}")
    every = [stage.name for stage in known]
    unknown = [name for name in names if name not in (*every, EVERY_LAYER, MIDDLE)]
    if unknown:
        raise ValueError(
            f"there is no stage {unknown[0]!r} in this backbone; choose from {every}, '{MIDDLE}' or '{EVERY_LAYER}'"
        )
    first_stack = [stage.name for stage in known if stage.place[0] == known[0].place[0]]
    wanted = {first_stack[len(first_stack) // 2] if name == MIDDLE else name for name in names}
    chosen = [stage for stage in known if stage.name in wanted or EVERY_LAYER in wanted]
    ends = [*(stage.switches.start for stage in chosen[1:]), known[-1].switches.stop]
    return tuple(
        stage._replace(switches=slice(stage.switches.start, end)) for stage, end in zip(chosen, ends, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Choice:
    """What of a decision is still to be made in the pass.

    Attributes:
        stages: Where; the next one first.
        choose: Takes what is seen there to the decisions of the stage's switches and to the tokens that are kept.
        mask: Of the input's tokens, ``[batch, length]``; ``None``: all are looked at.
        skip: What is decided so far, bool ``[batch, switches]``; what is not yet decided runs.
        settle: ``settle(decision, hidden, cache)`` makes the next stage's decision, puts it in force and returns it.
        needs: Numbers of the shadows that it needs.
    """

    stages: tuple[Stage, ...]
    choose: Callable[[Seen], tuple[Tensor | NDArray, Tensor | NDArray | None]]
    mask: Tensor | None
    skip: NDArray
    settle: Callable[[Decision, Tensor, Cache | None], Decision | None]
    needs: tuple[int, ...]

    def seen(self, hidden: Tensor, encoded: Tensor | None, tokens: DroppedTokens | None, repeats: int) -> Seen:
        """What the pass shows at the next stage.

        Args:
            hidden: What enters the layer, or the encoder's output.
            encoded: The encoder's output, in the decoder.
            tokens: The tokens that are dropped, if any are.
            repeats: How often each row stands there, for its beams or samples, which are still the same.
        """
        stage = self.stages[0]
        if repeats > 1:
            hidden, encoded = hidden[::repeats], None if encoded is None else encoded[::repeats]
        if stage.follows_encoder and not stage.is_between:
            mask = hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
            mask[:, :1] = 1
        else:
            mask = self._mask(hidden, tokens)
        return Seen(stage.name, hidden, mask, encoded)

    def grown(self, skip: NDArray) -> NDArray:
        """What is decided so far, and at the next stage, bool ``[batch, switches]``.

        Raises:
            ValueError: If the stages decide on different numbers of rows.
        """
        if 1 not in (len(skip), len(self.skip)) and len(skip) != len(self.skip):
            raise ValueError(
                f"stage {self.stages[0].name!r} decides on {len(skip)} rows, and the stages before it on "
                f"{len(self.skip)}; give a row for each row of the batch, or a single one for all"
            )
        if skip.shape[1] == self.skip.shape[1]:  # of all switches at once
            return skip
        grown = self.skip.repeat(len(skip), axis=0) if len(self.skip) == 1 else self.skip.copy()
        grown[:, self.stages[0].switches] = skip
        return grown

    def _mask(self, hidden: Tensor, tokens: DroppedTokens | None) -> Tensor:
        """The mask of the input's tokens as far as they are there; what stands behind them is not looked at."""
        batch, length = len(hidden), hidden.shape[1] if tokens is None else tokens.length
        mask = self.mask
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
        index, valid = tokens.view(batch)
        return mask.gather(1, index) * valid
