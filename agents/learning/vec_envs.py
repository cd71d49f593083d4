"""Observations of Stable-Baselines3 agents while they learn: zeroed, or with noise."""

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sd_gym.envs.protocols import Core
from sd_gym.policy import blinded
from sd_gym.tasks.ranking import STATISTICS_SIZE

OVERFITTING_DECISIONS = 50  # decisions per row at which PPO and A2C begin to overfit


class ObservationVecEnv(VecEnvWrapper):
    """Adds Gaussian noise, against overfitting to rows that are decided on often (Bishop 1995); zeros if ``blind``.

    ``deviation`` is the noise's, float32 ``[features]``; ``None``: no noise. Draws come from torch's random state.
    A blind agent observes only the stage, if there are several ``stages``.
    """

    def __init__(self, env: VecEnv, stages: list[str], *, blind: bool) -> None:
        super().__init__(env)
        self.deviation: NDArray | None = None
        self._stages = stages
        self._blind = blind

    def reset(self) -> VecEnvObs:
        """Reset the inner env."""
        return self._changed(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """A step of the inner env."""
        observations, rewards, dones, infos = self.venv.step_wait()
        return self._changed(observations), rewards, dones, infos

    def _changed(self, observations: VecEnvObs) -> VecEnvObs:
        if self.deviation is not None:
            assert isinstance(observations, np.ndarray)  # ``noise_deviation`` returns None otherwise
            observations = observations + self.deviation * torch.randn(observations.shape).numpy()
        assert not isinstance(observations, tuple)  # no space of sd_gym is a tuple
        return blinded(observations, self._stages) if self._blind else observations


def noise_deviation(core: Core, split_name: str, noise: float | None, decisions: int) -> NDArray | None:
    """The deviation of the noise on each feature, float32 ``[features]``; ``None``: no noise.

    Args:
        core: The env's core. Only flat observations before the first layer have noise.
        split_name: The split to learn on.
        noise: In deviations of each feature; ``None``: 1.0 from ``OVERFITTING_DECISIONS`` decisions per row on, else 0.
        decisions: Decisions of the whole run.
    """
    split = core.split(split_name)
    if noise is None:
        noise = float(decisions >= OVERFITTING_DECISIONS * len(split))
    space = core.observation_space
    if not noise or core.stages != ["first"] or not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        return None
    observations = np.asarray(core.observe(split, np.arange(min(len(split), STATISTICS_SIZE))))
    return (noise * observations.std(axis=0)).astype(np.float32)
