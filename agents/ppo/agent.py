"""PPO, by Stable-Baselines3: on the env's reward, under a multiplier, or with two value heads and quality first."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from sd_gym.agents.learning.agent import LearnerSettings
from sd_gym.agents.learning.crpo import Rectified, RectifiedAgent, RectifiedSettings
from sd_gym.agents.learning.lagrangian import LagrangianAgent, LagrangianSettings
from sd_gym.agents.learning.sb3 import SB3Agent
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv


class PPOSettings(LearnerSettings):
    """Settings of PPO; a rollout is ``num_envs * n_steps`` decisions: small ones, for many updates.

    A rollout is one minibatch. Advantages are normalised by the minibatch, and in a small one a lost instance, which is
    rare, weighs less than its reward says. ``n_steps`` and ``batch_size`` count decisions, whatever number of stages
    each is made at.
    """

    space: ClassVar = LearnerSettings.space | {
        "entropy": [0.0, 0.003, 0.01, 0.03],
        "num_envs": [128, 256, 512, 1024],
        "batch_size": [64, 128, 256],
        "n_epochs": [2, 4, 8],
    }

    num_envs: int = Field(256, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    n_steps: int = Field(1, ge=1)
    batch_size: int = Field(256, ge=2)
    n_epochs: int = Field(4, ge=1)
    clip_range: float = Field(0.2, gt=0)


class PPOAgent(SB3Agent):
    """Proximal policy optimisation (Schulman et al. 2017, equation 7)."""

    Settings = PPOSettings
    settings: PPOSettings
    Algorithm: ClassVar[type[PPO]] = PPO

    def _make_algorithm(self, vec_env: VecEnv) -> PPO:
        return self.Algorithm(
            **self._common(vec_env),
            batch_size=self.settings.batch_size * self.stages,
            n_epochs=self.settings.n_epochs,
            clip_range=self.settings.clip_range,
        )


class PPOLagrangianSettings(PPOSettings, LagrangianSettings):
    """Settings of PPO and of its multiplier."""


class PPOLagrangianAgent(LagrangianAgent, PPOAgent):
    """PPO whose penalty learns to keep the mean quality (Ray, Achiam and Amodei 2019, section 5)."""

    Settings = PPOLagrangianSettings
    settings: PPOLagrangianSettings


class RectifiedPPO(Rectified, PPO):
    """PPO with two value heads and quality first."""


class PPOLexSettings(PPOSettings, RectifiedSettings):
    """Settings of PPO and of its constraint."""

    space: ClassVar = PPOSettings.space | {"limit": (0.5, 4.0)}

    limit: float = Field(1.5, gt=0)


class PPOLexAgent(RectifiedAgent, PPOAgent):
    """PPO that restores the quality while it is violated and saves while it is not (``Rectified``)."""

    Settings = PPOLexSettings
    settings: PPOLexSettings
    Algorithm = RectifiedPPO
