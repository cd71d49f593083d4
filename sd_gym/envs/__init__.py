"""One batched core and its shells: ``gymnasium.Env``, ``gymnasium.vector.VectorEnv``, Stable-Baselines3 ``VecEnv``."""

from sd_gym.envs.config import ConfigError, EnvConfig
from sd_gym.envs.core import Core, Outcome, shared_core
from sd_gym.envs.shells import SwitchableEnv, SwitchableVectorEnv
from sd_gym.envs.split import Split

__all__ = [
    "ConfigError",
    "Core",
    "EnvConfig",
    "Outcome",
    "Split",
    "SwitchableEnv",
    "SwitchableVectorEnv",
    "shared_core",
]
