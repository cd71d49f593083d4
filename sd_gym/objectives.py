"""What a decision is worth: quality first, then less computation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sd_gym.config import ObjectiveFunction, RewardConfig, objective_name
from sd_gym.registry import Registry, UnknownNameError

Floats = NDArray[np.float64]
# Of a multiplier, a decision. At 0.1 it rises to several times its start while the policy is still poor, and is still
# falling when 20,000 decisions end.
MULTIPLIER_RATE = 0.02
NO_LAGRANGIAN = (
    "an env's reward does not move, so a multiplier that learns is not the env's: train the agent ppo_lagrangian "
    "(with its setting multiplier_rate), or put sd_gym.envs.wrappers.LagrangianWrapper "
    "(LagrangianVectorWrapper) around the env for an algorithm of your own, and leave objective out"
)


def lexicographic(
    quality: Floats,
    quality_ref: Floats,
    flops_ratio: Floats,
    *,
    epsilon: float,
    penalty: float,
    cost_scale: float,
    gains: Literal["counted", "ignored"] = "counted",
) -> Floats:
    """Savings less a penalty for the quality that is lost, ``[n]``; the constants are keys of the config.

    With ``cost = quality_ref - quality`` it is ``1 - flops_ratio - penalty * cost / cost_scale``. A gained answer earns
    what a lost one costs, as the constraint is on the mean. A penalty of 1 is the paper's weighted sum.

    Where gains are ignored it is ``1 - flops_ratio`` if ``cost <= epsilon``, else ``-penalty * min(1, (cost - epsilon)
    / cost_scale)``: any decision that keeps the instance's quality beats any that does not.
    """
    if gains == "counted":
        return 1.0 - flops_ratio - penalty * (quality_ref - quality) / cost_scale
    excess = quality_ref - epsilon - quality
    return np.where(excess > 0, -penalty * np.minimum(1.0, excess / cost_scale), 1.0 - flops_ratio)


OBJECTIVES: Registry[ObjectiveFunction] = Registry("objective", {"lexicographic": lexicographic})


def register_objective(name: str, function: ObjectiveFunction) -> None:
    """Make an objective of your own known: then ``objective=name`` works in ``gym.make``, YAML files and ``--set``.

    Args:
        name: What it is called.
        function: Takes ``(quality, quality_ref, flops_ratio, *, epsilon, penalty, cost_scale)`` to rewards: the first
            three are float64 ``[n]``, of decisions made together, the others the config's keys; returns ``[n]``.

    Raises:
        ValueError: If the name is one of the project's, or the function takes something else.

    Example:
        >>> import sd_gym
        >>> def risky(quality, quality_ref, flops_ratio, **constants):
        ...     return quality / quality_ref.clip(0.01) - flops_ratio
        >>> sd_gym.register_objective("risky", risky)
    """
    _check_arguments(name, function)
    OBJECTIVES.register(name, function)


def objective_function(objective: str | ObjectiveFunction) -> ObjectiveFunction:
    """The function of a name, or the function itself; raises ``ValueError`` if it is none."""
    if isinstance(objective, str):
        if objective == "lagrangian" and objective not in OBJECTIVES.names():
            raise UnknownNameError(NO_LAGRANGIAN)
        return OBJECTIVES.find(objective)
    _check_arguments(objective_name(objective), objective)
    return objective


def _check_arguments(name: str, function: ObjectiveFunction) -> None:
    expected = "quality, quality_ref, flops_ratio, *, epsilon, penalty, cost_scale"
    try:
        inspect.signature(function).bind(None, None, None, epsilon=0, penalty=0, cost_scale=0)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the objective {name!r} has to take ({expected}), those that it does not need as **rest: {error}"
        ) from error


class Objective:
    """Turns what came of decisions into rewards, always alike: it has no state.

    Raises ``ValueError`` if the objective's name is unknown, the function takes something else, or it is told to ignore
    gains and is not ``lexicographic``.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self.name = objective_name(reward.objective)
        self.function = objective_function(reward.objective)
        self.constants = {key: getattr(reward, key) for key in ("epsilon", "penalty", "cost_scale")}
        if self.function is lexicographic:
            self.constants["gains"] = reward.gains
        elif reward.gains != "counted":
            raise ValueError(
                f"gains={reward.gains!r} is a form of the objective lexicographic, and {self.name!r} does not know it; "
                "leave reward.gains out"
            )

    def rewards(self, quality: Floats, quality_ref: Floats, flops_ratio: Floats) -> Floats:
        """Rewards ``[n]`` of ``n`` decisions made together; raises ``ValueError`` if they are not ``n`` finite ones."""
        given = self.function(quality, quality_ref, flops_ratio, **self.constants)
        rewards = np.asarray(given, dtype=np.float64)
        if rewards.shape != quality.shape or not np.isfinite(rewards).all():
            raise ValueError(
                f"the objective {self.name!r} has to give a finite reward for each of {len(quality)} decisions, got "
                f"{given!r}"
            )
        return rewards


@dataclass(kw_only=True)
class Lagrangian:
    """Rewards whose penalty, a multiplier, learns to keep the mean quality; it belongs to the agent, not to the env.

    The Lagrangian of ``max E[savings]`` under ``E[quality] >= E[quality_ref] - epsilon``: savings minus the multiplier
    times the quality that is missing (negative where there is more than enough). Every decision raises the multiplier
    by ``rate`` times the quality that it lacks, never below 0: dual ascent (Tessler, Mankowitz and Mannor 2019,
    equation 10). So it is the mean quality that is kept, not that of each instance, and nobody has to know the right
    penalty.
    """

    multiplier: float  # the one in force; at first, where it starts
    rate: float  # how fast it moves, a decision
    epsilon: float  # how much quality may be lost, in its own unit
    cost_scale: float  # the missing quality that costs a whole multiplier

    def rewards(self, quality: Floats, quality_ref: Floats, flops_ratio: Floats) -> Floats:
        """Rewards ``[n]`` of ``n`` decisions made together; the multiplier moves after they are given."""
        missing = (quality_ref - self.epsilon - quality) / self.cost_scale
        rewards = 1.0 - flops_ratio - self.multiplier * missing
        self.multiplier = max(0.0, self.multiplier + self.rate * float(missing.sum()))
        return rewards
