"""Stages: the points of a forward pass where a policy sees its state and decides the next switches.

A ``PassState`` holds what a pass has computed up to a stage. The pass can be resumed from it under other decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sd_gym.switch.architectures import Switch
from sd_gym.switch.cache import LayerKeys, joined_keys

EVERY_LAYER = "every_layer"  # all stages of a backbone
BETWEEN = "decoder"  # the stage between encoder and decoder
MIDDLE = "middle"  # the stage before the middle layer of the first stack


@dataclass(frozen=True, eq=False)
class PassState:
    """The state of a pass at a stage, from which it can be resumed.

    Attributes:
        stage: Name of the stage.
        hidden: Hidden states that enter the layer, ``[batch, positions, width]``, without dropped tokens; at
            ``decoder`` the encoder's output.
        mask: 1 at the input's tokens, 0 at padding and at an answer after a prompt, ``[batch, positions]``. In the
            decoder of an encoder-decoder only the first position is 1, as ``generate()`` has no other.
        encoded: At the decoder's stages, the encoder's output ``[batch, source, width]``; else ``None``.
        keys: In ``generate()`` of a decoder-only model with a cache, what each earlier layer holds; else ``None``.
    """

    stage: str
    hidden: Tensor
    mask: Tensor
    encoded: Tensor | None = None
    keys: tuple[LayerKeys, ...] | None = None

    @property
    def size(self) -> int:
        """Padded tokens, and how many more would take the memory of its keys and values."""
        keys = sum(layer.keys.numel() + layer.values.numel() for layer in self.keys or ())
        return (self.hidden.numel() + keys) // self.hidden.shape[-1]

    def rows(self, indices: Tensor) -> PassState:
        """The state of some rows, by indices int64 ``[rows]``, to resume only those; the padding stays the same.

        Raises ``ValueError`` if there are ``keys``, and a row has skipped an earlier attention.
        """
        encoded = None if self.encoded is None else self.encoded.index_select(0, indices)
        keys = self.keys and tuple(layer.of(indices, self.hidden.shape[1]) for layer in self.keys)
        hidden, mask = self.hidden.index_select(0, indices), self.mask.index_select(0, indices)
        return PassState(self.stage, hidden, mask, encoded, keys)

    def padded(self, length: int, side: str) -> PassState:
        """The state at so many positions: padding is added at a ``side``, ``left`` or ``right``, or taken away."""

        def resized(values: Tensor) -> Tensor:
            more = length - values.shape[1 if values.ndim < 4 else 2]
            return F.pad(values, (0, 0) * (values.ndim > 2) + ((more, 0) if side == "left" else (0, more)))

        encoded = None if self.encoded is None else resized(self.encoded)
        keys = self.keys and tuple(LayerKeys(resized(layer.keys), resized(layer.values)) for layer in self.keys)
        return PassState(self.stage, resized(self.hidden), resized(self.mask), encoded, keys)

    @staticmethod
    def joined(states: Sequence[PassState]) -> PassState:
        """The state of all rows of several states at the same stage, at equally many positions."""
        hidden, mask = torch.cat([state.hidden for state in states]), torch.cat([state.mask for state in states])
        sources = [state.encoded for state in states if state.encoded is not None]
        held = [state.keys for state in states if state.keys is not None]
        encoded, keys = torch.cat(sources) if sources else None, joined_keys(held) if held else None
        return PassState(states[0].stage, hidden, mask, encoded, keys)


class StageReached(Exception):  # noqa: N818  (not an error: it ends the pass on purpose)
    """Carries the state of a pass at the stage that it was run to."""

    def __init__(self, state: PassState) -> None:
        self.state = state


class Stage(NamedTuple):
    """A point of the forward pass."""

    name: str  # ``first``, ``decoder``, or stack and index of a layer
    place: tuple[str, int]  # stack and index of the layer right after it
    switches: slice  # the switches that are decided there, up to the next stage
    follows_encoder: bool  # whether it is after the encoder of an encoder-decoder

    @property
    def is_between(self) -> bool:
        """Whether it is between encoder and decoder, where the state is the encoder's output."""
        return self.follows_encoder and self.place[1] == 0


def stages_of(switches: Sequence[Switch]) -> list[Stage]:
    """All stages of a backbone, in execution order, from its switches."""
    layers: dict[tuple[str, int], list[int]] = {}  # indices of each layer's switches
    for position, switch in enumerate(switches):
        layers.setdefault((switch.stack, switch.index), []).append(position)
    stages = []
    for (stack, index), (first, *others) in layers.items():
        name = f"{stack}.{index}" if index else stack
        span = slice(first, first + 1 + len(others))
        stages.append(Stage(name if first else "first", (stack, index), span, not switches[first].reads_input))
    return stages


def stages_named(known: Sequence[Stage], names: Sequence[str]) -> tuple[Stage, ...]:
    """The named stages among ``known``, in execution order, each with the switches up to the next stage.

    ``every_layer`` means all stages, ``middle`` the middle layer of the first stack. Raises ``ValueError`` if there is
    no name, or the backbone has no such stage.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"stages must be a list of one or more names, such as ['first']; got {names!r}")
    choices = [*(stage.name for stage in known), MIDDLE, EVERY_LAYER]
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise ValueError(f"there is no stage {unknown[0]!r} in this backbone; choose from {choices}")
    first_stack = [stage.name for stage in known if stage.place[0] == known[0].place[0]]
    wanted = {first_stack[len(first_stack) // 2] if name == MIDDLE else name for name in names}
    chosen = [stage for stage in known if stage.name in wanted or EVERY_LAYER in wanted]
    ends = [*(stage.switches.start for stage in chosen[1:]), known[-1].switches.stop]
    return tuple(
        stage._replace(switches=slice(stage.switches.start, end)) for stage, end in zip(chosen, ends, strict=True)
    )
