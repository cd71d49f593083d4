"""Controls that learn nothing: everything runs, or switches are skipped at random."""

from __future__ import annotations

import torch
from pydantic import Field
from sd_gym.agents.common.agent import Agent, AgentSettings, OnRollout, initial_bias
from stable_baselines3.common.logger import Logger

from sd_gym.policy import DecisionPolicy


class RandomSettings(AgentSettings):
    """Settings of the random control."""

    rate: float = Field(0.2, gt=0, lt=1)


class _Fixed(Agent):
    """An agent whose policy is given from the start."""

    rate: float
    stochastic = False

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """There is nothing to learn."""

    def policy(self) -> DecisionPolicy:
        """The same odds for every input."""
        policy = self._new_policy(stochastic=self.stochastic)
        with torch.no_grad():
            policy.head.weight.zero_()
            policy.head.bias.copy_(initial_bias(self.env.core.nvec, self.rate))
        return policy.eval()


class DenseAgent(_Fixed):
    """Nothing is skipped."""

    rate = 0.01


class RandomAgent(_Fixed):
    """Each switch is skipped with probability ``rate``, whatever the input."""

    Settings = RandomSettings
    settings: RandomSettings
    stochastic = True

    @property
    def rate(self) -> float:
        """The skip rate."""
        return self.settings.rate
