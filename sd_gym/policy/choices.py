"""The choices that a decision is made of: components of the same size side by side, and their probabilities."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Components side by side that have the same number of choices: one tensor operation serves them all.

    Attributes:
        components: Which.
        columns: Where their logits are.
        size: Choices of each.
    """

    components: slice
    columns: slice
    size: int

    def of(self, logits: Tensor) -> Tensor:
        """Their logits ``[n, components, size]``, of those of all components, ``[n, sum(nvec)]``."""
        return logits[:, self.columns].unflatten(1, (-1, self.size))


def groups_of(nvec: list[int]) -> list[Group]:
    """The components in as few groups as there are."""
    groups, component, column = [], 0, 0
    for size, alike in groupby(nvec):
        count = len(list(alike))
        groups.append(Group(slice(component, component + count), slice(column, column + count * size), size))
        component, column = component + count, column + count * size
    return groups


def bounded(logits: Tensor, lowest: float) -> Tensor:
    """Log-probabilities ``[..., size]`` of the choices with these logits, none less probable than ``lowest``."""
    log_prob = logits.log_softmax(dim=-1)
    if lowest == 0:
        return log_prob
    return torch.log((1 - logits.shape[-1] * lowest) * log_prob.exp() + lowest)
