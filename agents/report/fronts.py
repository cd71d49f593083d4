"""Fronts of quality and FLOPs, and how much one saves more than another at the same quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import BOOTSTRAP_SAMPLES, decide_rows, deciding_flops, score_decisions

from sd_gym.envs.core import Core
from sd_gym.envs.split import Split
from sd_gym.policy import DecisionPolicy


class Front(NamedTuple):
    """Results of several policies, or versions of one, on the same instances.

    Attributes:
        quality: ``[policies, n]``.
        flops_ratio: ``[policies, n]``, the policies' own FLOPs included.
    """

    quality: NDArray
    flops_ratio: NDArray


def front_of(core: Core, split: Split, policies: Sequence[DecisionPolicy]) -> Front:
    """Score policies on a whole split; the dense decision, at its full FLOPs, always belongs to a front."""
    rows, policies = np.arange(len(split)), list(policies)
    every = [decide_rows(core, policy, split, rows) for policy in policies]
    # A policy that does not look at its input need not run at all.
    own = [
        deciding_flops(core, policy, split, rows) if policy.head.weight.any() and not policy.blind else 0 * rows
        for policy in policies
    ]
    return front_of_decisions(core, split, every, own)


def front_of_decisions(core: Core, split: Split, every: Sequence[NDArray], own: Sequence[NDArray]) -> Front:
    """As ``front_of``, of the decisions of each policy, ``[n, components]``, and the FLOPs of deciding, ``[n]``."""
    rows = np.arange(len(split))
    decided = np.stack([*every, np.zeros((len(rows), len(core.nvec)))])
    # Versions of a policy agree on most instances: each decision on an instance is scored once.
    pairs = np.column_stack([np.tile(rows, len(decided)), decided.reshape(-1, len(core.nvec)).astype(np.int64)])
    different, back = np.unique(pairs, axis=0, return_inverse=True)
    scored = score_decisions(core, split, different[:, 0], different[:, 1:])
    quality, flops = (scored[name][back].reshape(decided.shape[:2]) for name in ("quality", "flops_ratio"))
    return Front(quality, flops + np.array([*own, 0 * rows]) / split.costs.dense_flops(rows))


def flops_at(quality: float, front_quality: NDArray, front_flops: NDArray) -> float:
    """The fewest FLOPs with which the points of a front have a quality.

    Any two of them can be mixed, one for some inputs and the other for the rest, drawn without a look at the input: the
    front is convex.

    Args:
        quality: Mean quality.
        front_quality: Mean quality of each point, ``[m]``.
        front_flops: Mean FLOPs ratio of each point, ``[m]``.

    Raises:
        ValueError: If no point is that good.
    """
    good = front_quality >= quality
    if not good.any():
        raise ValueError(f"expected a quality of at most {front_quality.max():.4f}, got {quality:.4f}")
    (better, dear), (worse, cheap) = ((front_quality[on, None], front_flops[on, None]) for on in (good, ~good))
    share = (quality - worse.T) / (better - worse.T)
    return float(min(dear.min(), (cheap.T + share * (dear - cheap.T)).min(initial=np.inf)))


def flops_at_loss(front: Front, loss: float) -> float:
    """FLOPs ratio at which a front loses so much of the dense quality."""
    return _flops_at_loss(front.quality.mean(axis=1), front.flops_ratio.mean(axis=1), loss)


def _flops_at_loss(quality: NDArray, flops: NDArray, loss: float) -> float:
    return flops_at(quality[-1] - loss, quality, flops)


def flops_samples(front: Front, losses: Sequence[float], *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> NDArray:
    """FLOPs ratio at which a front loses so much, and what it would be on other instances: a bootstrap over them.

    The same seed draws the same instances, so that samples of several fronts are paired.

    Args:
        front: To read.
        losses: Of mean quality, at which it is read.
        samples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        ``[losses, 1 + samples]``; the first column is of the instances as they are.
    """
    n = front.quality.shape[1]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples) / n
    weights = np.vstack([np.full(n, 1 / n), drawn]).T
    means = list(zip((front.quality @ weights).T, (front.flops_ratio @ weights).T, strict=True))
    return np.array([[_flops_at_loss(quality, flops, loss) for quality, flops in means] for loss in losses])
