"""The masks among which a policy decides before the first layer, if they are few."""

import numpy as np
import torch
from numpy.typing import NDArray

from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.table_export import TablePolicy


def decided_masks(policy: SkipPolicy) -> NDArray | None:
    """The masks that a policy decides among before the first layer, at all its operating points; ``None``: any.

    int64 ``[masks, switches + 1]``.
    """
    choices = choices_of(policy)
    return None if choices is None else np.unique(masks_of(policy, choices), axis=0)


def choices_of(policy: SkipPolicy) -> NDArray | None:
    """What a policy chooses among before the first layer, int64 ``[choices, components]``; ``None``: anything."""
    network = policy.learned
    size = len(network.nvec) - policy.has_answer_stage
    if not network.head.weight[: sum(network.nvec[:size])].any():  # one mask for all inputs, as in a cascade
        margins = {0.0, *(point.margin for point in policy.operating_points)}
        biases = [network.with_margin(margin).head.bias.detach() for margin in margins]
        return np.unique(network.choose(torch.stack(biases)).numpy()[:, :size], axis=0)
    if network.codebook is not None:
        of_all = network.codebook.numpy()[:, :size]
        return of_all[of_all[:, 0] >= 0]  # the others are of later stages
    return np.arange(network.nvec[0])[:, None] if size == 1 else None


def masks_of(policy: SkipPolicy, choices: NDArray) -> NDArray:
    """The mask of each choice, int64 ``[choices, switches + 1]``."""
    network = policy.network
    if isinstance(network, TablePolicy) and network.masks is not None:
        accepted = np.pad(choices, ((0, 0), (0, int(policy.has_answer_stage))))
        choices = network.masks[np.ravel_multi_index(tuple(accepted.T), network.network.nvec)]
    return choices[:, : len(network.switches) + 1]
