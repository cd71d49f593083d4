"""A2C, by Stable-Baselines3, on the env's reward."""

from typing import ClassVar

from pydantic import Field
from sd_gym.agents.learning.agent import LearnerSettings
from sd_gym.agents.learning.sb3 import SB3Agent, SB3Settings
from stable_baselines3 import A2C


class A2CSettings(SB3Settings):
    """Settings of A2C. A rollout is used for one update; in a small one a rare lost instance would weigh too little."""

    space: ClassVar = LearnerSettings.space | {
        "learning_rate": (5e-5, 1e-2),  # from the default with a ``start``
        "entropy": [0.0, 0.02, 0.05, 0.1],
        "num_envs": [16, 32, 64, 128],
        "n_steps": [1, 2, 4],
    }

    num_envs: int = Field(64, ge=1)
    learning_rate: float = Field(4e-3, gt=0)


class A2CAgent(SB3Agent[A2CSettings]):
    """Advantage actor-critic (Mnih et al. 2016), synchronous, with Adam and normalised advantages."""

    Settings = A2CSettings
    refining_rate = 5e-5

    def _make_algorithm(self) -> A2C:
        return A2C(**self._common(), use_rms_prop=False, normalize_advantage=True)
