"""Is the quality kept? A non-inferiority test that also works where no answer differs from the dense one."""

import math
from bisect import bisect_left
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc
from scipy.stats import norm

CONFIDENCE = 0.95  # one-sided


class Differences(NamedTuple):
    """What the verdict needs to know about differences in quality."""

    mean: float
    square: float  # mean square
    lost: float  # summed loss of the instances that lose more than ``worst / 2``, over ``n * worst``
    others: float  # mean difference of the other instances


class Verdict(StrEnum):
    """The quality is kept, it is not shown to be kept, or no result on so few instances could show it."""

    KEPT = "quality kept"
    NOT_SHOWN = "quality not shown to be kept"
    TOO_FEW = "too few instances to tell"


def fewest_instances(epsilon: float, worst: float = 1.0, confidence: float = CONFIDENCE) -> float:
    """With fewer instances no result, not even one without any loss, shows that the quality is kept.

    If one instance in ``worst / epsilon`` loses all that it can (``worst``), ``n`` instances show no loss with
    probability ``(1 - epsilon / worst)^n``: at one point and 95%, 299 instances are needed (the "rule of three").
    ``confidence`` is one-sided, from 0.5 to below 1.
    """
    if epsilon >= worst:
        return 0
    if epsilon <= 0:
        return math.inf
    errors = norm.ppf(confidence)  # standard errors of a normal distribution
    by_chance = math.log1p(-confidence) / math.log1p(-epsilon / worst)
    by_score = errors**2 * (worst - epsilon) / epsilon  # the larger one above 95% confidence
    return math.ceil(max(by_chance, by_score))


def losses_allowed(n: int, epsilon: float, highest: float = 1.0) -> int | None:
    """How many of ``n`` answers of quality ``highest`` may be lost, with none gained, for the verdict "quality kept".

    ``None`` if the instances are too few; arguments as in ``verdict``.
    """
    return _largest_count(n, epsilon, highest, lambda lost: Differences(-lost / n, lost / n, lost / n, 0.0))


def changes_allowed(n: int, epsilon: float, highest: float = 1.0) -> int | None:
    """How many of ``n`` answers may change, half of them gained and half lost, for the verdict "quality kept".

    They change in pairs, so it is an even number; see ``losses_allowed``.
    """

    def changed(pairs: int) -> Differences:
        return Differences(0.0, min(1.0, 2 * pairs / n), pairs / n, pairs / max(1, n - pairs))

    most = _largest_count(n, epsilon, highest, changed)
    return None if most is None else min(2 * most, n - n % 2)


def _largest_count(n: int, epsilon: float, highest: float, differences: Callable[[int], Differences]) -> int | None:
    """The largest count, at most ``n``, whose ``differences`` still show that the quality is kept."""
    if n < max(1, fewest_instances(epsilon, highest)):
        return None
    limit = epsilon / highest
    return (
        bisect_left(range(n + 1), True, key=lambda count: not _is_shown(differences(count), n, limit, 1.0, CONFIDENCE))
        - 1
    )


def verdict(
    quality: NDArray, quality_ref: NDArray, epsilon: float, confidence: float = CONFIDENCE, highest: float = 1.0
) -> Verdict:
    """Non-inferiority: is the mean of ``quality - quality_ref`` above ``-epsilon``?

    A score test. Its variance is that under the hypothesis that exactly epsilon is lost: the least favourable one, in
    which some instances lose all that they can (``worst``). For paired binary outcomes it is close to Tango's (1998,
    Statistics in Medicine 17, equation 3). It has a variance where no answer differs, and holds for graded outcomes.
    For few instances, exact binomial tests have to pass as well: of the net loss, and of the losses above ``worst /
    2``, allowing for what other instances gain. ``tests/agents/runs/test_verdict.py`` simulates all of it. ``quality
    [n]`` is at least 0, ``quality_ref [n]`` dense, ``confidence`` one-sided, and ``highest`` (``Scores.highest``) the
    most that any instance can lose.
    """
    difference = quality - quality_ref
    n = len(quality)
    worst = _worst(quality_ref, highest)
    if n < max(1, fewest_instances(epsilon, worst, confidence)):
        return Verdict.TOO_FEW
    loses = difference < -worst / 2
    lost, others = -difference[loses].sum() / worst / n, difference[~loses].mean() if not loses.all() else 0.0
    known = Differences(float(difference.mean()), float(np.mean(difference**2)), float(lost), float(others))
    return Verdict.KEPT if _is_shown(known, n, epsilon, worst, confidence) else Verdict.NOT_SHOWN


def highest_loss(quality: NDArray, quality_ref: NDArray, confidence: float = CONFIDENCE, highest: float = 1.0) -> float:
    """The upper bound of the mean loss at a one-sided confidence: the least epsilon at which the quality is kept.

    It inverts ``verdict`` by bisection; arguments as there. Without instances it is the largest possible loss.
    """
    low, high = 0.0, _worst(quality_ref, highest)
    while high - low > 1e-6:
        middle = (low + high) / 2
        kept = verdict(quality, quality_ref, middle, confidence, highest) == Verdict.KEPT
        low, high = (low, middle) if kept else (middle, high)
    return high


def difference_interval(quality: NDArray, quality_ref: NDArray, highest: float = 1.0) -> tuple[float, float]:
    """95% interval of the mean of ``quality - quality_ref``; arguments as for ``verdict``.

    A normal interval after adding two instances: one that loses everything and one that gains as much. So its width is
    not zero where no answer differs. Agresti and Min (2005, Statistics in Medicine 24) add half an instance of each.
    """
    worst = _worst(quality_ref, highest)
    values = np.r_[quality - quality_ref, worst, -worst]
    half = norm.ppf(0.975) * values.std() / math.sqrt(len(values))
    return max(-worst, float(values.mean() - half)), min(worst, float(values.mean() + half))


def _worst(quality_ref: NDArray, highest: float) -> float:
    """The most that an instance can lose: no quality is below 0."""
    return max(1.0, highest, float(quality_ref.max(initial=0.0)))


def _is_shown(known: Differences, n: int, epsilon: float, worst: float, confidence: float) -> bool:
    """Whether ``n`` differences, summarised in ``known``, show that less than epsilon is lost."""
    mean, gain = known.mean, max(0.0, known.others)
    if mean <= -epsilon:
        return False
    if epsilon >= worst:
        return True
    share = (mean + epsilon) / (mean + worst)  # share of instances that would have to lose all, for epsilon to be lost
    variance = (1 - share) * known.square + share * worst**2 - epsilon**2
    net, beside_gains = epsilon / worst, (epsilon + gain) / (worst + gain)  # how many lose all if epsilon is lost
    by_chance = max(
        _probability_of_at_most(max(0.0, -mean) / worst, n, net), _probability_of_at_most(known.lost, n, beside_gains)
    )
    return bool((mean + epsilon) * math.sqrt(n / variance) >= norm.ppf(confidence) and by_chance <= 1 - confidence)


def _probability_of_at_most(share: float, n: int, expected: float) -> float:
    """The probability that at most this share of ``n`` instances is lost, each with probability ``expected``."""
    lost = share * n
    return float(betainc(n - lost, lost + 1, max(0.0, 1 - expected))) if lost < n else 1.0
