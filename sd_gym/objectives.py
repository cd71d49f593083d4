"""The lexicographic objective and its alternatives, as functions of arrays; one value a row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def quality_cost(quality: Floats, quality_ref: Floats, epsilon: float) -> Floats:
    """How much more quality was lost than allowed: ``max(0, quality_ref - epsilon - quality)``, ``[n]``."""
    return np.maximum(0.0, quality_ref - epsilon - quality)


def lexicographic(cost: Floats, flops_ratio: Floats, penalty: float, cost_scale: float) -> Floats:
    """Quality first: savings where the quality is kept, a penalty where it is not.

    Any outcome that keeps the quality (reward in [0, 1]) beats any that does not (reward in [-penalty, 0)).

    Args:
        cost: ``quality_cost``, ``[n]``.
        flops_ratio: ``[n]``.
        penalty: Reward lost at full cost.
        cost_scale: The cost that counts as full, in units of quality.
    """
    return np.where(cost > 0, -penalty * np.minimum(1.0, cost / cost_scale), 1.0 - flops_ratio)


def scalarized(cost: Floats, flops_ratio: Floats, penalty: float, cost_scale: float) -> Floats:
    """The weighted sum that the paper compares with: savings minus ``penalty`` times the scaled cost, ``[n]``."""
    return 1.0 - flops_ratio - penalty * cost / cost_scale


OBJECTIVES: dict[str, Callable[[Floats, Floats, float, float], Floats]] = {
    "lexicographic": lexicographic,
    "scalarized": scalarized,
}
