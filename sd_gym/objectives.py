"""The lexicographic objective and its alternatives: quality first, then less computation."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ObjectiveName = Literal["lexicographic", "lagrangian", "scalarized"]


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


class Objective:
    """Turns what came of decisions into rewards; each env has its own.

    ``lagrangian`` is the Lagrangian of ``max E[savings]`` under ``E[quality] >= E[quality_ref] - epsilon``: savings
    minus a multiplier times the quality that is missing (negative where there is more than enough). The multiplier
    starts at ``penalty`` and follows the constraint: every decision raises it by ``multiplier_rate`` times what it
    lacks, never below 0. So it is the mean quality that is kept, not that of each instance, and nobody has to know the
    right penalty. The other objectives have no state.

    Args:
        name: ``lexicographic``, ``lagrangian`` or ``scalarized``.
        epsilon: How much quality may be lost, in its own unit.
        penalty: Reward lost at full cost; the multiplier's start.
        cost_scale: The cost that counts as full, in units of quality.
        multiplier_rate: How fast the multiplier moves, a decision.

    Attributes:
        multiplier: The penalty in force; it belongs to the state of a run.
    """

    def __init__(
        self, name: ObjectiveName, *, epsilon: float, penalty: float, cost_scale: float, multiplier_rate: float
    ) -> None:
        self.name = name
        self.epsilon = epsilon
        self.cost_scale = cost_scale
        self.multiplier_rate = multiplier_rate
        self.multiplier = penalty

    def rewards(self, quality: Floats, quality_ref: Floats, flops_ratio: Floats) -> Floats:
        """Rewards ``[n]`` of ``n`` decisions made together; the multiplier moves after they are given."""
        if self.name == "lagrangian":
            missing = (quality_ref - self.epsilon - quality) / self.cost_scale
            rewards = 1.0 - flops_ratio - self.multiplier * missing
            self.multiplier = max(0.0, self.multiplier + self.multiplier_rate * float(missing.sum()))
            return rewards
        objective = lexicographic if self.name == "lexicographic" else scalarized
        cost = quality_cost(quality, quality_ref, self.epsilon)
        return objective(cost, flops_ratio, self.multiplier, self.cost_scale)
