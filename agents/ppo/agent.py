"""PPO, by Stable-Baselines3, on the env's reward."""

from typing import ClassVar, TypeVar

from pydantic import Field
from sd_gym.agents.learning.agent import LearnerSettings
from sd_gym.agents.learning.sb3 import SB3Agent, SB3Settings
from stable_baselines3 import PPO


class PPOSettings(SB3Settings):
    """Settings of PPO; ``n_steps`` and ``batch_size`` count decisions, each with all its stages.

    A rollout is small, for many updates, and is one minibatch.

    Attributes:
        batch_size: Decisions per minibatch. Advantages are normalised per minibatch, so in a small one a rare lost
            instance weighs too little.
        n_epochs: Passes over each rollout.
        clip_range: How far the ratio of new to old probability may move from 1 before its gradient stops.
    """

    space: ClassVar = LearnerSettings.space | {
        "entropy": [0.0, 0.003, 0.01, 0.03],
        "num_envs": [128, 256, 512, 1024],
        "batch_size": [64, 128, 256],
        "n_epochs": [2, 4, 8],
    }

    num_envs: int = Field(256, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    batch_size: int = Field(256, ge=2)
    n_epochs: int = Field(4, ge=1)
    clip_range: float = Field(0.2, gt=0)


PPOSettingsT = TypeVar("PPOSettingsT", bound=PPOSettings)


class PPOAgent(SB3Agent[PPOSettingsT]):
    """Proximal policy optimisation of Stable-Baselines3 on the env's reward (Schulman et al. 2017, equation 7)."""

    Settings = PPOSettings
    refining_rate = 2e-4
    Algorithm: ClassVar[type[PPO]] = PPO

    def _make_algorithm(self) -> PPO:
        return self.Algorithm(
            **self._common(),
            batch_size=self.settings.batch_size * self.stages,
            n_epochs=self.settings.n_epochs,
            clip_range=self.settings.clip_range,
        )
