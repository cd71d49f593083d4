"""Envs: one batched core as ``gymnasium.Env``, ``gymnasium.vector.VectorEnv`` and Stable-Baselines3 ``VecEnv``.

This module does not import torch, which an env of a table does not need.
"""

from sd_gym.config import ConfigError, EnvConfig
from sd_gym.envs.protocols import Core, Outcome, Split
from sd_gym.envs.shared import shared_core
from sd_gym.envs.single import SwitchableEnv
from sd_gym.envs.table_shells import TableEnv, TableVectorEnv
from sd_gym.envs.vector import SwitchableVectorEnv

__all__ = [
    "ConfigError",
    "Core",
    "EnvConfig",
    "Outcome",
    "Split",
    "SwitchableEnv",
    "SwitchableVectorEnv",
    "TableEnv",
    "TableVectorEnv",
    "shared_core",
]
