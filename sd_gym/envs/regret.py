"""How much reward a policy leaves on a table, where the outcomes of all masks are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.table import TableSplit
from sd_gym.objectives import Objective

Array = NDArray
ROWS = 256  # that are looked at together under all masks


def regret(split: TableSplit, policy: Callable[[Any], Array]) -> Array:
    """How much less reward each instance gets from a policy than from the best of all masks, float64 ``[n]``.

    The reward is that of the env's config.

    Args:
        split: A split of a table.
        policy: From observations ``[n, ...]`` to decisions ``[n, components]``, such as ``DecisionPolicy.decide``;
            called once a stage.
    """
    core, rows = split.core, np.arange(len(split))
    decisions, _ = core.rollout(split, rows, lambda seen: core.checked(policy(seen), len(split)))
    outcome = core.score(split, rows, decisions)
    rewards = Objective(split.config.reward).rewards(outcome.quality, outcome.quality_ref, outcome.flops_ratio)
    return best_rewards(split) - rewards


def best_rewards(split: TableSplit) -> Array:
    """The reward of each instance under the best of all masks, float64 ``[n]``."""
    return np.concatenate([rewards.max(axis=1) for _, rewards in _rewards(split)])


def static_regret(split: TableSplit) -> float:
    """Mean ``regret`` of the one mask for all instances that has least of it, which is known only in hindsight.

    A policy with less has learned something about its inputs.
    """
    lost = np.zeros(len(split.core.masks))
    for _, rewards in _rewards(split):
        lost += (rewards.max(axis=1, keepdims=True) - rewards).sum(axis=0)
    return float(lost.min() / len(split))


def _rewards(split: TableSplit) -> Iterator[tuple[Array, Array]]:
    """Rows, and their rewards under all masks, ``[rows, masks]``; some rows after the other."""
    objective = Objective(split.config.reward)
    for start in range(0, len(split), ROWS):
        rows = np.arange(start, min(start + ROWS, len(split)))
        quality, flops = split.scoring.of_masks(rows), split.costs.of_masks(rows)
        reference = np.repeat(quality[:, 0], quality.shape[1])
        yield rows, objective.rewards(quality.ravel(), reference, flops.ravel()).reshape(quality.shape)
