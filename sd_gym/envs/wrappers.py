"""Other conventions around an env."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs


class SafetyWrapper(gym.Wrapper, RecordConstructorArgs):
    """Steps as Safety-Gymnasium's envs do, with a cost of its own beside the reward (Ji et al. 2023).

    The reward is what is saved, ``1 - flops_ratio``; the cost is ``max(0, quality_ref - epsilon - quality)``.

    Args:
        env: An env of this package.

    Example:
        >>> import gymnasium as gym, sd_gym
        >>> from sd_gym.envs.wrappers import SafetyWrapper
        >>> env = SafetyWrapper(gym.make("SD/Classification-Mini-v0", train_size=20))
        >>> observation, info = env.reset(seed=0)
        >>> dense = env.action_space.sample() * 0
        >>> observation, reward, cost, terminated, truncated, info = env.step(dense)
        >>> reward, cost
        (0.0, 0.0)
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def step(self, action: Any) -> tuple[Any, float, float, bool, bool, dict[str, Any]]:
        """(observation, reward, cost, terminated, truncated, info) of the step; raises as the env's."""
        observation, _, terminated, truncated, info = self.env.step(action)
        return observation, 1 - info["flops_ratio"], info["cost"], terminated, truncated, info
