"""The place where one candidate is skipped or run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from sd_gym.switch.architectures import Sublayer


@dataclass
class Switch:
    """The place where one candidate is skipped or run.

    Attributes:
        name: ``stack.layer.kind``, such as ``decoder.3.cross_attention``.
        stack: Name of the stack that it is in.
        index: Index of its layer in the stack.
        layer: The layer module that it is in.
        sublayer: What it switches.
        reads_input: Whether its stack is the one that reads the input, whose tokens can be dropped.
        modules: The switched modules, in execution order.
    """

    name: str
    stack: str
    index: int
    layer: nn.Module
    sublayer: Sublayer
    reads_input: bool
    modules: list[nn.Module] = field(init=False, repr=False)

    @property
    def tags_cache(self) -> bool:
        """Whether a cache can tell here under which decision it is filled: the first self-attention of a decoder."""
        return self.stack == "decoder" and self.index == 0 and self.sublayer.kind == "attention"

    def __post_init__(self) -> None:
        self.modules = [self.layer.get_submodule(path) for path in self.sublayer.modules]
