"""Wrappers for other conventions: costs beside rewards, and penalties that learn."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

from sd_gym.config import RewardConfig
from sd_gym.envs.protocols import SCORES
from sd_gym.objectives import MULTIPLIER_RATE, Lagrangian


class SafetyWrapper(gym.Wrapper, RecordConstructorArgs):
    """Steps return a cost beside the reward, as in Safety-Gymnasium (Ji et al. 2023).

    The reward is the savings, ``1 - flops_ratio``; the cost is ``quality_ref - quality``, with its sign. The limit on
    the mean cost is the config's ``epsilon``. Where an episode has several stages both come with the last one.

    Raises:
        ValueError: If the env has no such reward: it is a queue, or not of this package.
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        _reward_config(env)

    def step(self, action: Any) -> Any:
        """(observation, reward, cost, terminated, truncated, info) of the step; raises as the env's."""
        observation, _, terminated, truncated, info = self.env.step(action)
        savings = 1 - info["flops_ratio"] if terminated else 0.0
        return observation, savings, info["cost"], terminated, truncated, info


class LagrangianWrapper(gym.Wrapper, RecordConstructorArgs):
    """Rewards whose penalty learns to keep the mean quality (``sd_gym.objectives.Lagrangian``), for any algorithm.

    Where an episode has several stages the reward comes with the last one.

    Args:
        env: An env of this package.
        multiplier: The first penalty; ``None``: the ``penalty`` of the env's config.
        rate: How fast the penalty moves per decision.

    Attributes:
        lagrangian: Holds the current ``multiplier``, which a checkpoint has to keep.

    Raises:
        ValueError: If the env has a ``reward.dense`` or a ``reward.vector``, is a queue, or not of this package.

    Example:
        >>> import gymnasium as gym, sd_gym
        >>> from sd_gym.envs.wrappers import LagrangianWrapper
        >>> env = LagrangianWrapper(gym.make("SD/Classification-Mini-v0", train_size=20, epsilon=0.5), rate=2)
        >>> observation, info = env.reset(seed=0)
        >>> dense = env.action_space.sample() * 0
        >>> observation, reward, terminated, truncated, info = env.step(dense)
        >>> reward, env.lagrangian.multiplier  # more than enough quality: the penalty of 20 falls by 2 * 0.5
        (10.0, 19.0)
    """

    def __init__(self, env: gym.Env, multiplier: float | None = None, rate: float = MULTIPLIER_RATE) -> None:
        RecordConstructorArgs.__init__(self, multiplier=multiplier, rate=rate)
        gym.Wrapper.__init__(self, env)
        self.lagrangian = _lagrangian(env, multiplier, rate)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The env's step with this reward; raises as the env's."""
        observation, _, terminated, truncated, info = self.env.step(action)
        reward = float(self.lagrangian.rewards(*np.array([[info[key]] for key in SCORES]))[0]) if terminated else 0.0
        return observation, reward, terminated, truncated, info


class LagrangianVectorWrapper(VectorWrapper):
    """``LagrangianWrapper`` for a vector env: its envs share one multiplier, which moves once per step.

    Raises:
        ValueError: If the env has a ``reward.dense`` or a ``reward.vector``.
    """

    def __init__(self, env: VectorEnv, multiplier: float | None = None, rate: float = MULTIPLIER_RATE) -> None:
        super().__init__(env)
        self.lagrangian = _lagrangian(env, multiplier, rate)

    def step(self, actions: Any) -> tuple[Any, NDArray, NDArray, NDArray, dict[str, Any]]:
        """The env's step with these rewards, float64 ``[num_envs]``; raises as the env's."""
        observations, _, terminated, truncated, infos = self.env.step(actions)
        rewards, outcome = np.zeros(self.num_envs), infos.get("final_info", infos)
        if terminated.any():
            rewards[terminated] = self.lagrangian.rewards(*(outcome[key][terminated] for key in SCORES))
        return observations, rewards, terminated, truncated, infos


def _lagrangian(env: gym.Env | VectorEnv, multiplier: float | None, rate: float) -> Lagrangian:
    reward = _reward_config(env)
    for key in ("dense", "vector"):
        if getattr(reward, key):
            raise ValueError(
                f"a Lagrangian gives one reward an episode, but the env has reward.{key}=True; leave it out"
            )
    start = reward.penalty if multiplier is None else multiplier
    return Lagrangian(multiplier=start, rate=rate, epsilon=reward.epsilon, cost_scale=reward.cost_scale)


def _reward_config(env: gym.Env | VectorEnv) -> RewardConfig:
    """The part ``reward`` of an env's config; raises ``ValueError`` if it has none."""
    reward = getattr(getattr(env.unwrapped, "config", None), "reward", None)
    if not isinstance(reward, RewardConfig):
        raise ValueError(f"expected an env whose steps skip parts of a backbone, got {env}; queues have other rewards")
    return reward
