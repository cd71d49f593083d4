"""Every YAML file of ``envs_configs/`` becomes a Gymnasium id, at ``import sd_gym``; nothing heavy is imported here."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import gymnasium as gym

CONFIG_FOLDER = Path(str(files("sd_gym.envs_configs")))


def config_files() -> list[Path]:
    """The configuration files, sorted by name."""
    return sorted(CONFIG_FOLDER.glob("*.yaml"))


def env_id(file: Path) -> str:
    """The Gymnasium id in a configuration file, read from its line ``id: ...``.

    Parsing only that line keeps ``import sd_gym`` fast.
    """
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("id:"):
            return line.removeprefix("id:").strip()
    raise ValueError(f"{file}: no line 'id: ...'")


def register_envs() -> None:
    """Register all envs with Gymnasium."""
    for file in config_files():
        gym.register(
            env_id(file),
            entry_point="sd_gym.envs:SwitchableEnv",
            vector_entry_point="sd_gym.envs:SwitchableVectorEnv",
            kwargs={"config_file": file.name},
        )


def registered_ids() -> list[str]:
    """The ids of all sd_gym envs."""
    return [env_id(file) for file in config_files()]
