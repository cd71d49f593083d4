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
        stack: Name of its stack.
        index: Index of its layer in the stack.
        layer: Its layer.
        sublayer: What it switches.
        reads_input: Whether its stack reads the input, whose tokens can be dropped.
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
        """Whether it tags a cache with the decision in force: the first self-attention of a decoder does."""
        return self.stack == "decoder" and self.index == 0 and self.sublayer.kind == "attention"

    def __post_init__(self) -> None:
        self.modules = [self.layer.get_submodule(path) for path in self.sublayer.modules]
