"""Objectives: the rewards of decisions, quality first, then less computation."""

import inspect
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sd_gym.config import ObjectiveFunction, RewardConfig, objective_name
from sd_gym.registry import Registry, UnknownNameError

Floats = NDArray[np.float64]
# Of a multiplier, per decision. At 0.1 the multiplier rises to several times its start while the policy is still poor,
# and is still falling after 20,000 decisions.
MULTIPLIER_RATE = 0.02
NO_LAGRANGIAN = (
    "an env's reward is fixed, so it has no learned multiplier: train the agent ppo_lagrangian (with its setting "
    "multiplier_rate), or for your own algorithm wrap the env in sd_gym.envs.wrappers.LagrangianWrapper "
    "(LagrangianVectorWrapper), and leave objective out"
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
    """Savings minus a penalty for lost quality, ``[n]``; the constants are keys of the config.

    With ``cost = quality_ref - quality`` it is ``1 - flops_ratio - penalty * cost / cost_scale``. A gained answer earns
    as much as a lost answer costs, since the constraint is on the mean. A penalty of 1 is the paper's weighted sum.

    If gains are ignored it is ``1 - flops_ratio`` where ``cost <= epsilon``, otherwise ``-penalty * min(1, (cost -
    epsilon) / cost_scale)``: any decision that keeps the instance's quality at no more than dense's FLOPs beats any
    that does not.
    """
    if gains == "counted":
        return 1.0 - flops_ratio - penalty * (quality_ref - quality) / cost_scale
    excess = quality_ref - epsilon - quality
    return np.where(excess > 0, -penalty * np.minimum(1.0, excess / cost_scale), 1.0 - flops_ratio)


OBJECTIVES: Registry[ObjectiveFunction] = Registry("objective", {"lexicographic": lexicographic})


def register_objective(name: str, function: ObjectiveFunction) -> None:
    """Register your own objective, so that ``objective=name`` works in ``gym.make``, YAML files and ``--set``.

    Args:
        name: Name of the objective.
        function: Maps ``(quality, quality_ref, flops_ratio, *, epsilon, penalty, cost_scale)`` to rewards ``[n]``. The
            first three are float64 ``[n]``, of decisions made together; the others are keys of the config.

    Raises:
        ValueError: If the name is built in, or the function takes other arguments.

    Example:
        >>> import sd_gym
        >>> def risky(quality, quality_ref, flops_ratio, **constants):
        ...     return quality / quality_ref.clip(0.01) - flops_ratio
        >>> sd_gym.register_objective("risky", risky)
    """
    _check_arguments(name, function)
    OBJECTIVES.register(name, function)


def _function_of(objective: str | ObjectiveFunction) -> ObjectiveFunction:
    """The function of a name, or the function itself; raises ``ValueError`` if it is not an objective."""
    if isinstance(objective, str):
        if objective == "lagrangian" and objective not in OBJECTIVES:
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
            f"the objective {name!r} must take ({expected}); unneeded ones may be **rest: {error}"
        ) from error


class Objective:
    """Computes rewards from the outcomes of decisions; it has no state.

    Raises ``ValueError`` if the objective's name is unknown, its function takes other arguments, or gains are to be
    ignored by another objective than ``lexicographic``.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self.name = objective_name(reward.objective)
        self.function = _function_of(reward.objective)
        self.constants = {key: getattr(reward, key) for key in ("epsilon", "penalty", "cost_scale")}
        if self.function is lexicographic:
            self.constants["gains"] = reward.gains
        elif reward.gains != "counted":
            raise ValueError(
                f"gains={reward.gains!r} is an option of the objective lexicographic, not of {self.name!r}; leave "
                "reward.gains out"
            )

    def rewards(self, quality: Floats, quality_ref: Floats, flops_ratio: Floats) -> Floats:
        """Rewards ``[n]`` of ``n`` decisions made together; raises ``ValueError`` if they are not ``n`` finite ones."""
        own = quality.copy(), quality_ref.copy(), flops_ratio.copy()  # a user's function may change them in place
        output = self.function(*own, **self.constants)
        rewards = np.asarray(output, dtype=np.float64)
        if rewards.shape != quality.shape or not np.isfinite(rewards).all():
            raise ValueError(
                f"the objective {self.name!r} must return a finite reward for each of {len(quality)} decisions, got "
                f"{output!r}"
            )
        return rewards


@dataclass(kw_only=True)
class Lagrangian:
    """Rewards with a learned penalty, the multiplier, that keeps the mean quality; part of the agent, not of the env.

    It is the Lagrangian of ``max E[savings]`` under ``E[quality] >= E[quality_ref] - epsilon``: savings minus the
    multiplier times the missing quality (negative if there is more than enough). Each decision changes the multiplier
    by ``rate`` times its missing quality, never below 0: dual ascent (Tessler, Mankowitz and Mannor 2019, equation 10).
    So the mean quality is kept, not that of each instance, and the penalty needs no tuning.
    """

    multiplier: float  # current value; at first the start value
    rate: float  # learning rate of the multiplier, per decision
    epsilon: float  # how much quality may be lost, in its own unit
    cost_scale: float  # the missing quality whose penalty equals the multiplier

    def rewards(self, quality: Floats, quality_ref: Floats, flops_ratio: Floats) -> Floats:
        """Rewards ``[n]`` of ``n`` decisions made together; the multiplier is updated afterwards."""
        missing = (quality_ref - self.epsilon - quality) / self.cost_scale
        rewards = 1.0 - flops_ratio - self.multiplier * missing
        self.multiplier = max(0.0, self.multiplier + self.rate * float(missing.sum()))
        return rewards
