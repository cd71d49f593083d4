"""A codebook: the few decisions that a reduced policy chooses from."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_cover(likely: Tensor, size: int) -> list[int]:
    """At most ``size`` masks by which inputs' decisions are the most probable in all, mask 0 always among them.

    Added one by one, each is the one that raises the sum of the inputs' best log-probabilities the most, which is at
    least 63% as good as the best choice (Nemhauser, Wolsey and Fisher 1978).

    Args:
        likely: Logarithm of how probable each mask is for each input, ``[n, masks]``.
        size: At least 1.

    Returns:
        Numbers of the masks, in the order in which they were added.
    """
    chosen, best = [0], likely[:, 0]
    while len(chosen) < size:
        added = torch.maximum(likely, best[:, None])
        gain = added.sum(dim=0, dtype=torch.float64) - best.sum(dtype=torch.float64)
        if gain.max() <= 0:
            break
        chosen.append(int(gain.argmax()))
        best = added[:, chosen[-1]]
    return chosen


def of_each_stage(codebook: Tensor) -> list[Tensor]:
    """The masks ``[masks, components]`` of each stage: those that have the same components."""
    _, group = (codebook >= 0).unique(dim=0, return_inverse=True)
    return [codebook[group == number] for number in range(int(group.max()) + 1)]
