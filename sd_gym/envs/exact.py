"""What is exactly known of a table: the best static mask, the oracle, and a policy's regret."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.table import TableSplit
from sd_gym.objectives import Objective

Array = NDArray
ROWS = 256  # that are looked at together under all masks
SLACK = 1e-9  # of a mean quality: sums of many numbers differ in their last bits


class Exact(NamedTuple):
    """Decisions on a split, and what they lead to.

    Attributes:
        masks: Number of the mask of each instance, int64 ``[n]``.
        quality: Mean.
        quality_ref: Mean of the dense backbone.
        flops_ratio: Mean.
    """

    masks: Array
    quality: float
    quality_ref: float
    flops_ratio: float


def best_static(split: TableSplit, loss: float = 0.0) -> Exact:
    """The one mask for all instances with the fewest FLOPs, of those that lose at most ``loss`` of the mean quality.

    Args:
        split: A split of a table.
        loss: In the task's unit.
    """
    quality, flops = np.zeros(len(split.core.masks)), np.zeros(len(split.core.masks))
    for _, under, cost in _parts(split):
        quality += under.sum(axis=0)
        flops += cost.sum(axis=0)
    kept = quality / len(split) >= quality[0] / len(split) - loss - SLACK
    best = int(np.where(kept, flops, np.inf).argmin())
    return _exact(split, np.full(len(split), best))


def oracle(split: TableSplit, loss: float = 0.0) -> Exact:
    """The mask with the fewest FLOPs of each instance, of those that lose it at most ``loss`` of its quality.

    It looks at the answers, and a lucky wrong way counts as right: a bound, and no target.

    Args:
        split: A split of a table.
        loss: In the task's unit, of each instance.
    """
    masks = np.zeros(len(split), dtype=np.int64)
    for rows, quality, flops in _parts(split):
        masks[rows] = np.where(quality >= quality[:, :1] - loss, flops, np.inf).argmin(axis=1)
    return _exact(split, masks)


def regret(split: TableSplit, policy: Callable[[Any], Array]) -> Array:
    """How much less reward each instance gets from a policy than from the best of all masks, float64 ``[n]``.

    The reward is that of the table's config.

    Args:
        split: A split of a table.
        policy: From observations ``[n, ...]`` to decisions ``[n, components]``, such as ``DecisionPolicy.decide``;
            called once a stage.
    """
    core, lost = split.core, np.empty(len(split))
    decisions, _ = core.rollout(split, np.arange(len(split)), lambda seen: core.checked(policy(seen), len(split)))
    masks = core.masks_of(decisions)
    for rows, rewards in _rewards(split):
        lost[rows] = rewards.max(axis=1) - rewards[np.arange(len(rows)), masks[rows]]
    return lost


def static_regret(split: TableSplit) -> float:
    """Mean ``regret`` of the one mask for all instances that has least of it, which is known only in hindsight.

    A policy with less has learned something about its inputs.

    Args:
        split: A split of a table.
    """
    lost = np.zeros(len(split.core.masks))
    for _, rewards in _rewards(split):
        lost += (rewards.max(axis=1, keepdims=True) - rewards).sum(axis=0)
    return float(lost.min() / len(split))


def _rewards(split: TableSplit) -> Iterator[tuple[Array, Array]]:
    """Rows, and their rewards under all masks, ``[rows, masks]``; some rows after the other."""
    objective = Objective(split.config.reward)
    for rows, quality, flops in _parts(split):
        reference = np.repeat(quality[:, 0], quality.shape[1])
        yield rows, objective.rewards(quality.ravel(), reference, flops.ravel()).reshape(quality.shape)


def _parts(split: TableSplit) -> Iterator[tuple[Array, Array, Array]]:
    """Rows, and their quality and FLOPs ratio under all masks, ``[rows, masks]`` each; some rows after the other."""
    for start in range(0, len(split), ROWS):
        rows = np.arange(start, min(start + ROWS, len(split)))
        yield rows, split.scoring.of_masks(rows), split.costs.of_masks(rows)


def _exact(split: TableSplit, masks: Array) -> Exact:
    core = split.core
    outcome = core.score(split, np.arange(len(split)), core.from_masks(core.masks[masks]))
    means = (float(values.mean()) for values in (outcome.quality, outcome.quality_ref, outcome.flops_ratio))
    return Exact(masks, *means)
