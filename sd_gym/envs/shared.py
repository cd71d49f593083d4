"""The core of a configuration, one per process; for a table, torch is not imported."""

from sd_gym.config import EnvConfig
from sd_gym.envs.protocols import Core


def shared_core(config: EnvConfig) -> Core:
    """The core of a configuration, made once per process: only its caches ever change."""
    if config.table is not None:
        from sd_gym.envs.table import table_core

        return table_core(config)
    from sd_gym.envs.core import backbone_core

    return backbone_core(config)
