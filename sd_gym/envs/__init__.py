"""One batched core and its shells: ``gymnasium.Env``, ``gymnasium.vector.VectorEnv``, Stable-Baselines3 ``VecEnv``.

What needs torch is imported when it is asked for: an env of a table does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_gym.config import ConfigError, EnvConfig
    from sd_gym.envs.protocols import Core, Outcome, Split
    from sd_gym.envs.shared import shared_core
    from sd_gym.envs.single import SwitchableEnv
    from sd_gym.envs.table_shells import TableEnv, TableVectorEnv
    from sd_gym.envs.vector import SwitchableVectorEnv

_WHERE = {
    "ConfigError": "config",
    "Core": "protocols",
    "EnvConfig": "config",
    "Outcome": "protocols",
    "Split": "protocols",
    "SwitchableEnv": "single",
    "SwitchableVectorEnv": "vector",
    "TableEnv": "table_shells",
    "TableVectorEnv": "table_shells",
    "shared_core": "shared",
}

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


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sd_gym.envs' has no attribute {name!r}")
    return getattr(import_module(f"sd_gym.envs.{_WHERE[name]}"), name)
