"""Which decisions a backbone meets while it is prepared: three ways to draw them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sd_gym.switch import Switchboard

Draw = Callable[[int, Tensor, float, torch.Generator], Tensor]


def layers_of(board: Switchboard) -> Tensor:
    """Number of the layer that each switch is in, through all stacks in execution order, int64 ``[switches]``."""
    numbers: dict[tuple[str, int], int] = {}
    return torch.tensor([numbers.setdefault((switch.stack, switch.index), len(numbers)) for switch in board.switches])


def even(rows: int, layers: Tensor, max_rate: float, generator: torch.Generator) -> Tensor:
    """Each row draws its own rate from ``[0, max_rate]``, then each switch by that rate: int64 ``[rows, switches]``.

    ``layers``: from ``layers_of``.
    """
    rates = torch.rand(rows, 1, generator=generator) * max_rate
    return (torch.rand(rows, len(layers), generator=generator) < rates).long()


def deeper(rows: int, layers: Tensor, max_rate: float, generator: torch.Generator) -> Tensor:
    """Like ``even``, but a row's rate grows with depth: from nothing before the first layer to twice after the last.

    What is skipped deep down has fewer layers after it that must make up for it (Fan et al. 2020, progressive rates).
    """
    depth = (2 * layers + 1) / (layers.max() + 1)  # 1 on average over layers
    rates = torch.rand(rows, 1, generator=generator) * max_rate * depth
    return (torch.rand(rows, len(layers), generator=generator) < rates).long()


def staged(rows: int, layers: Tensor, max_rate: float, generator: torch.Generator) -> Tensor:
    """As staged policies decide: layers run up to a random one; after it, half of the rows skip all, half ``even``."""
    skip = even(rows, layers, max_rate, generator)
    look = torch.randint(0, int(layers.max()) + 2, (rows, 1), generator=generator)
    leaves = torch.rand(rows, 1, generator=generator) < 0.5
    return torch.where(layers < look, 0, torch.where(leaves, 1, skip))


DRAWS: dict[str, Draw] = {"even": even, "deeper": deeper, "staged": staged}
