"""Presets: settings of agents that were measured to be better than their defaults, by env or by purpose."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from sd_gym.agents.registry import BLIND, agent_class

from sd_gym.registration import registered_ids

BUNDLED = Path(str(files("sd_gym.agents") / "presets.yaml"))
OF_ENV, NONE = "env", "none"  # what the env has by itself, if anything; and nothing


@dataclass(frozen=True)
class Preset:
    """What a preset says of an agent.

    Attributes:
        name: An env's id, the name of a purpose, or the path of a file.
        settings: Of the agent.
    """

    name: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{key} {value}' for key, value in self.settings.items())})"


def find_preset(name: str, env_id: str, algo: str) -> Preset | None:
    """The preset of an agent on an env.

    Args:
        name: ``env``: that of the env, if there is one; ``none``: none; the name of one of ``agents/presets.yaml``; or
            the path of a YAML file like it, of which the entry of the env counts.
        env_id: The env.
        algo: The agent; ``blind-NAME`` has that of NAME where it has none of its own.

    Returns:
        ``None`` where there is none for this agent.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is none of that name for any agent, or a file is no list of presets.
    """
    if name == NONE:
        return None
    own = Path(name).suffix in (".yaml", ".yml")
    presets = read_presets(Path(name) if own else BUNDLED)
    key = env_id if own or name == OF_ENV else name
    if name != OF_ENV and not any(key in named for named in presets.values()):
        where = f"{name} has presets for" if own else "presets by name are"
        known = sorted({other for named in presets.values() for other in named if own or other not in registered_ids()})
        raise ValueError(f"no preset {key!r}; {where} {', '.join(known) or 'nothing'}; and --preset none is none")
    for one in (algo, algo.removeprefix(BLIND)):
        if key in presets.get(one, {}):
            return Preset(name if own else key, presets[one][key])
    return None


def with_preset(name: str, env_id: str, algo: str, settings: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Settings with those of a preset under them, and the preset's name; ``None`` where there is none.

    Raises:
        FileNotFoundError, ValueError: As ``find_preset``.
        ValueError: If one was asked for and there is none for this agent.
    """
    preset = find_preset(name, env_id, algo)
    if preset is None:
        if name not in (OF_ENV, NONE):
            raise ValueError(f"the preset {name} has nothing for {algo} on {env_id}; leave --preset out")
        return None, settings
    return preset.name, {**preset.settings, **settings}


def read_presets(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The presets of a file: by agent, then by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else, or names an agent or a setting that there is not.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r} with presets")
    presets = yaml.safe_load(file.read_text(encoding="utf-8"))
    for algo, named in presets.items():
        known = agent_class(str(algo)).Settings.model_fields
        for name, settings in _mapping(file, algo, named).items():
            for key in _mapping(file, f"{algo}: {name}", settings):
                if key not in known:
                    raise ValueError(
                        f"{file}: {algo}: {name}: unknown setting {key!r}; {algo} has {', '.join(known)} (keys of an "
                        "env belong to --set)"
                    )
    return presets


def _mapping(file: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {where}: expected keys and values, got {value!r}")
    return value
