"""Statistics of a few runs: robust means with intervals, profiles, and areas under fronts.

Aggregates are those of Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice":
runs are resampled within each env (a stratified bootstrap). ``scores`` are a list with an array ``[runs]`` per env;
envs may have different numbers of runs. Intervals are 95% percentile intervals of ``samples`` bootstrap samples. The
paper's library, rliable, has heavy dependencies and needs an old pandas; the tests compare with it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import sem, t, trim_mean

Scores = Sequence[NDArray]
SAMPLES = 2000  # of a bootstrap
FEWEST_RUNS = 5  # per algorithm, to compare two of them: intervals from fewer runs are too narrow (Agarwal et al.)
BOUNDS = 2.5, 97.5  # percentiles of a 95% interval


def bootstrap_interval(values: NDArray) -> tuple[float, float]:
    """95% percentile interval of the mean of ``values [n]``."""
    return interval(_bootstrap_samples([values], SAMPLES)[0].mean(axis=1))


def interquartile_mean(scores: NDArray) -> NDArray:
    """Mean of the middle half of ``[..., runs]``: each end loses a quarter, rounded down to whole runs."""
    return trim_mean(scores, 0.25, axis=-1)


def aggregate(scores: Scores, *, samples: int = SAMPLES) -> tuple[float, float, float]:
    """Interquartile mean over the runs of all envs, and its interval: mean, low, high."""
    drawn = np.concatenate(_bootstrap_samples(scores, samples), axis=1)
    return float(interquartile_mean(np.concatenate(list(scores)))), *interval(interquartile_mean(drawn))


def performance_profile(
    scores: Scores, thresholds: NDArray, *, samples: int = SAMPLES
) -> tuple[NDArray, NDArray, NDArray]:
    """Share of all runs whose score is above each of ``thresholds``, and its interval, each ``[thresholds]``.

    Where one algorithm's profile lies above another's, it is better by every quantile.
    """
    drawn = np.concatenate(_bootstrap_samples(scores, samples), axis=1)
    share = (np.concatenate(list(scores)) > thresholds[:, None]).mean(axis=1)
    low, high = np.percentile([(drawn > threshold).mean(axis=1) for threshold in thresholds], BOUNDS, axis=1)
    return share, low, high


def probability_of_improvement(scores: Scores, others: Scores, *, samples: int = SAMPLES) -> tuple[float, float, float]:
    """Probability that a run of one algorithm is better than one of another on the same env, and its interval.

    The mean over envs of the Mann-Whitney statistic; equal scores count half. Raises ``ValueError`` if the numbers of
    envs differ.
    """
    if len(scores) != len(others):
        raise ValueError(f"expected scores of the same envs, got {len(scores)} and {len(others)} of them")
    pairs = zip(_bootstrap_samples(scores, samples), _bootstrap_samples(others, samples, seed=1), strict=True)
    drawn = np.mean([_share_better(first, second) for first, second in pairs], axis=0)
    observed = [_share_better(first[None], second[None])[0] for first, second in zip(scores, others, strict=True)]
    return float(np.mean(observed)), *interval(drawn)


def enough_runs(scores: Scores, others: Scores) -> bool:
    """Whether both algorithms have enough runs on each env for a comparison."""
    return min(map(len, [*scores, *others])) >= FEWEST_RUNS


def curve_interval(curves: NDArray, *, samples: int = SAMPLES) -> tuple[NDArray, NDArray, NDArray]:
    """Interquartile mean over runs at each point of ``curves [runs, points]``, and its interval, each ``[points]``.

    The bootstrap resamples whole runs.
    """
    chosen = np.random.default_rng(0).integers(len(curves), size=(samples, len(curves)))
    low, high = np.percentile(interquartile_mean(curves.T[:, chosen]), BOUNDS, axis=1)
    return interquartile_mean(curves.T), low, high


def half_interval(values: Sequence[float] | NDArray) -> float:
    """Half of the 95% interval (Student's t) of the mean; NaN for a single value."""
    return float(t.ppf(0.975, len(values) - 1) * sem(values)) if len(values) > 1 else float("nan")


def interval(values: NDArray) -> tuple[float, float]:
    """The middle 95% of bootstrap samples ``[samples]``."""
    low, high = np.percentile(values, BOUNDS)
    return float(low), float(high)


def pareto_front(quality: NDArray, flops_ratio: NDArray) -> NDArray:
    """Indices of the Pareto front of quality ``[n]`` and FLOPs ``[n]``, int64 ``[front]``, the cheapest first.

    The front has only one of several equal points.
    """
    order = np.lexsort((-quality, flops_ratio))
    best = np.maximum.accumulate(np.concatenate([[-np.inf], quality[order][:-1]])) if len(order) else quality
    return order[quality[order] > best]


def hypervolume(quality: NDArray, flops_ratio: NDArray, reference: tuple[float, float]) -> float:
    """The area that points of ``quality [n]`` and ``flops_ratio [n]`` dominate (exact; two objectives).

    ``reference`` is a quality and a FLOPs ratio; points that are worse in either add nothing.
    """
    worst, highest = reference
    inside = (quality > worst) & (flops_ratio < highest)
    quality, flops_ratio = quality[inside], flops_ratio[inside]
    front = pareto_front(quality, flops_ratio)
    width = np.diff(np.append(flops_ratio[front], highest))
    return float((width * (quality[front] - worst)).sum())


def _bootstrap_samples(scores: Scores, samples: int, seed: int = 0) -> list[NDArray]:
    """Runs drawn with replacement within each env: ``[samples, runs]`` per env."""
    random = np.random.default_rng(seed)
    return [np.asarray(runs)[random.integers(len(runs), size=(samples, len(runs)))] for runs in scores]


def _share_better(first: NDArray, second: NDArray) -> NDArray:
    """Share of the pairs of runs ``[samples, runs]`` in which the first is better, ``[samples]``."""
    above = (first[:, :, None] > second[:, None, :]).mean(axis=(1, 2))
    return above + 0.5 * (first[:, :, None] == second[:, None, :]).mean(axis=(1, 2))
