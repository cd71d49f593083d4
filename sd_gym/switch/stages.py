"""Stages: the points of a forward pass where it can be looked at, and the switches from there on be decided.

What a pass has computed up to a stage is kept as ``PassState``, from which it can be resumed under other decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from sd_gym.switch.switch import Switch

EVERY_LAYER = "every_layer"  # stands for all stages of a backbone
BETWEEN = "decoder"  # the stage between encoder and decoder
MIDDLE = "middle"  # stands for the layer in the middle of the first stack


@dataclass(frozen=True, eq=False)
class PassState:
    """The state of a pass at a stage, from which it can be resumed.

    Attributes:
        stage: Name of the stage.
        hidden: Hidden states that enter the layer, ``[batch, positions, width]``, without dropped tokens; at
            ``decoder`` the encoder's output.
        mask: Which positions count, ``[batch, positions]``: the input's tokens, neither padding nor an answer after a
            prompt. In the decoder of an encoder-decoder only the first position, as ``generate()`` has no other.
        encoded: At the decoder's stages, the encoder's output ``[batch, source, width]``; else ``None``.
    """

    stage: str
    hidden: Tensor
    mask: Tensor
    encoded: Tensor | None = None

    def rows(self, picked: Tensor) -> PassState:
        """Some rows of it, by indices int64 ``[rows]``, to resume those alone; they keep the batch's padding."""
        encoded = None if self.encoded is None else self.encoded.index_select(0, picked)
        return replace(
            self, hidden=self.hidden.index_select(0, picked), mask=self.mask.index_select(0, picked), encoded=encoded
        )


class StageReached(Exception):  # noqa: N818  (no error: it ends the pass on purpose)
    """A pass has reached the stage that it was run to; carries its state there."""

    def __init__(self, state: PassState) -> None:
        self.state = state


class Stage(NamedTuple):
    """A point of the forward pass."""

    name: str  # ``first``, ``decoder``, or stack and index of a layer
    place: tuple[str, int]  # stack and index of the layer that it stands in front of
    switches: slice  # those that are decided there, up to the next stage
    follows_encoder: bool  # whether it is in the decoder of an encoder-decoder, or between the two

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
    """Those of the ``known`` stages, in execution order, each with the switches up to the next one.

    ``every_layer`` stands for all, ``middle`` for the layer in the middle of the first stack. ValueError if there is no
    name, or one that the backbone does not have.
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
