"""Fronts of quality and FLOPs, and how much more one saves than another at the same quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.runs.statistics import SAMPLES

LEAST = 0.1  # the smallest loss at which fronts are compared, as a share of epsilon


class Front(NamedTuple):
    """Results of several policies, or versions of one, on the same instances."""

    quality: NDArray  # [policies, n]
    flops_ratio: NDArray  # [policies, n], the policies' own FLOPs included


@dataclass(frozen=True)
class EnvFronts:
    """Fronts of all agents of one env, on its test split."""

    env: str  # its id
    epsilon: float  # of its objective
    controls: dict[str, Front]  # "hull" and "blind", if they have runs; all runs of a control make one front
    learned: dict[str, list[Front]]  # by agent, a front per run


def flops_at(quality: float, front_quality: NDArray, front_flops: NDArray) -> float:
    """The lowest mean FLOPs ratio at a mean quality, of points with quality ``[m]`` and FLOPs ratio ``[m]``.

    Any two points can be mixed at random, so the front is convex. Raises ``ValueError`` if no point is that good.
    """
    good = front_quality >= quality
    if not good.any():
        raise ValueError(f"expected a quality of at most {front_quality.max():.4f}, got {quality:.4f}")
    (better, dear), (worse, cheap) = ((front_quality[on, None], front_flops[on, None]) for on in (good, ~good))
    share = (quality - worse.T) / (better - worse.T)
    return float(min(dear.min(), (cheap.T + share * (dear - cheap.T)).min(initial=np.inf)))


def flops_at_loss(front: Front, loss: float) -> float:
    """FLOPs ratio at which a front loses this much of the dense quality."""
    quality, flops = front.quality.mean(axis=1), front.flops_ratio.mean(axis=1)
    return flops_at(quality[-1] - loss, quality, flops)


def flops_samples(front: Front, losses: Sequence[float], *, samples: int = SAMPLES, seed: int = 0) -> NDArray:
    """FLOPs ratios of a front at mean losses, with a bootstrap over the instances: ``[losses, 1 + samples]``.

    The same seed draws the same instances, so samples of several fronts are paired. The first column is not resampled.
    """
    n = front.quality.shape[1]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples) / n
    weights = np.vstack([np.full(n, 1 / n), drawn]).T
    means = list(zip((front.quality @ weights).T, (front.flops_ratio @ weights).T, strict=True))
    return np.array([[flops_at(quality[-1] - loss, quality, flops) for quality, flops in means] for loss in losses])
