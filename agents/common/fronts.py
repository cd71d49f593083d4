"""Fronts of quality and FLOPs, and how much one saves more than another at the same quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.common.evaluation import BOOTSTRAP_SAMPLES, score_decisions

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
    rows = np.arange(len(split))
    quality, flops = [], []
    for policy in policies:
        scored = score_decisions(core, split, rows, policy.decide(core.observe(split, rows)))
        # A policy that does not look at its input need not run at all.
        own = policy.flops if policy.head.weight.any() and not policy.blind else 0
        quality.append(scored["quality"])
        flops.append(scored["flops_ratio"] + own / split.dense_flops(rows))
    reference = scored["quality_ref"]
    return Front(np.stack([*quality, reference]), np.stack([*flops, np.ones(len(rows))]))


def flops_at(quality: float, front_quality: NDArray, front_flops: NDArray) -> float:
    """FLOPs ratio at which a front has a quality, between its points by linear interpolation.

    Args:
        quality: Mean quality.
        front_quality: Mean quality of each point, ``[m]``.
        front_flops: Mean FLOPs ratio of each point, ``[m]``.
    """
    order = np.argsort(front_flops, kind="stable")
    best = np.maximum.accumulate(front_quality[order])  # what is worse and dearer than another point is no part of it
    first = np.r_[True, np.diff(best) > 0]
    return float(np.interp(quality, best[first], front_flops[order][first]))


def flops_at_loss(front: Front, loss: float, rows: NDArray | slice = slice(None)) -> float:
    """FLOPs ratio at which a front loses so much of the dense quality, on some of its instances."""
    quality = front.quality[:, rows].mean(axis=1)
    return flops_at(quality[-1] - loss, quality, front.flops_ratio[:, rows].mean(axis=1))


def saved_more(
    front: Front, other: Front, loss: float, *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """How much more of the FLOPs one front saves than another at the same quality, on the same instances.

    Args:
        front: Of the policy in question.
        other: What it is compared with.
        loss: Of mean quality, at which both are read.
        samples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        (difference, low, high), in shares of the dense FLOPs; the 95% interval is a paired bootstrap over instances.
    """
    random = np.random.default_rng(seed)
    n = front.quality.shape[1]

    def difference(rows: NDArray | slice) -> float:
        return flops_at_loss(other, loss, rows) - flops_at_loss(front, loss, rows)

    drawn = [difference(random.integers(n, size=n)) for _ in range(samples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return difference(slice(None)), float(low), float(high)
