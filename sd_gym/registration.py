"""Every YAML file of ``envs_configs/`` becomes a Gymnasium id, at ``import sd_gym``; nothing heavy is imported here."""

from __future__ import annotations

import difflib
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


def config_of(identity: str) -> Path:
    """The configuration file of an id.

    Raises:
        ValueError: If there is no such id.
    """
    known = {env_id(file): file for file in config_files()}
    if identity not in known:
        near = difflib.get_close_matches(identity, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown env {identity!r}{hint} Known: {', '.join(known)}.")
    return known[identity]


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
