"""From logits to choices: groups of components of the same size, noise for controls, and codebooks."""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Noise = Literal["none", "random", "hash"]


class Group(NamedTuple):
    """Consecutive components with the same number of choices, for one tensor operation."""

    components: slice
    columns: slice  # columns of their logits
    size: int  # choices of each

    def of(self, logits: Tensor) -> Tensor:
        """The logits of the group ``[n, components, size]``, of the logits of all components ``[n, sum(nvec)]``."""
        return logits[:, self.columns].unflatten(1, (-1, self.size))


def groups_of(nvec: list[int]) -> list[Group]:
    """The components in as few groups as possible."""
    groups = []
    component = 0
    column = 0
    for size, equal in groupby(nvec):
        count = len(list(equal))
        groups.append(Group(slice(component, component + count), slice(column, column + count * size), size))
        component, column = component + count, column + count * size
    return groups


def first_columns(nvec: Sequence[int] | NDArray) -> NDArray:
    """The column of each component's first choice in the logits of all components, int64 ``[components]``."""
    return np.cumsum([0, *nvec[:-1]])


def bounded(logits: Tensor, lowest: float) -> Tensor:
    """Log-probabilities ``[..., size]`` of the choices with these logits; each probability is at least ``lowest``.

    Of very many choices, half of the probability is shared evenly: more would hide which ones are preferred.
    """
    log_prob, size = logits.log_softmax(dim=-1), logits.shape[-1]
    if lowest == 0:
        return log_prob
    lowest = min(lowest, 0.5 / size)
    return torch.log((1 - size * lowest) * log_prob.exp() + lowest)


def with_noise(logits: Tensor, observations: Tensor | dict[str, Tensor], noise: Noise) -> Tensor:
    """Logits ``[n, columns]`` with noise, so that their argmax is a draw from their softmax; ``none``: unchanged."""
    if noise == "none":
        return logits
    if noise == "random":
        generator = torch.Generator(logits.device).manual_seed(0)
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    else:
        uniform = _hash_noise(observations, logits.shape[1])
    return logits - torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6)))


def _hash_noise(observations: Tensor | dict[str, Tensor], columns: int) -> Tensor:
    """Noise in [0, 1), ``[n, columns]``, that is nearly uniform and depends on the observation only."""
    if isinstance(observations, dict):
        parts = [observations[name].flatten(1) for name in ("stage", "tokens") if name in observations]
        observations = torch.cat(parts, dim=1)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(observations.shape[1], columns, generator=generator, dtype=torch.float64)
    mixed = observations.cpu().double() @ directions  # on the CPU, so that every device gives the same noise
    return torch.frac(torch.sin(mixed) * 43758.5453).abs().to(observations)


def greedy_cover(log_likelihood: Tensor, size: int) -> list[int]:
    """Choose at most ``size`` masks, mask 0 among them, that maximise the sum of the inputs' best log-probabilities.

    Each step adds the mask that raises the sum over ``[n, masks]`` the most. The result is at least 63% as good as the
    best choice (Nemhauser, Wolsey and Fisher 1978). Returns the masks' indices in the order chosen.
    """
    chosen, best = [0], log_likelihood[:, 0]
    while len(chosen) < size:
        added = torch.maximum(log_likelihood, best[:, None])
        gain = added.sum(dim=0, dtype=torch.float64) - best.sum(dtype=torch.float64)
        if gain.max() <= 0:
            break
        chosen.append(int(gain.argmax()))
        best = added[:, chosen[-1]]
    return chosen


def margins_of_changes(scores: Tensor, per_margin: Tensor) -> Tensor:
    """The margins at which the best mask changes, falling, ``[n, changes]``; minus infinity after a row's last one.

    A margin of m adds ``m * per_margin [masks]`` to the ``scores [n, masks]``. Each change goes to a mask with less per
    margin, on the upper envelope of these lines.
    """
    rows, found = torch.arange(len(scores), device=scores.device), list[Tensor]()
    best = scores.where(per_margin == per_margin.max(), -torch.inf).argmax(dim=1)
    for _ in range(len(per_margin.unique()) - 1):
        less = per_margin[best][:, None] - per_margin
        margins = ((scores - scores[rows, best][:, None]) / less).where(less > 0, -torch.inf)
        highest, following = margins.max(dim=1)
        best = following.where(highest > -torch.inf, best)
        found.append(highest)
    return torch.stack(found, dim=1) if found else scores[:, :0]


def codebook_of_each_stage(codebook: Tensor) -> list[Tensor]:
    """The masks ``[masks, components]`` of each stage; masks of a stage decide the same components."""
    _, group = (codebook >= 0).unique(dim=0, return_inverse=True)
    return [codebook[group == number] for number in range(int(group.max()) + 1)]
