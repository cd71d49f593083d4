"""Every YAML file of ``envs_configs/`` with an ``id`` becomes a Gymnasium id, at ``import sd_gym``.

Nothing heavy is imported here.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import gymnasium as gym
from gymnasium.envs.registration import parse_env_id

from sd_gym.registry import Registry, UnknownNameError, unknown

CONFIG_FOLDER = Path(str(files("sd_gym.envs_configs")))
OBSERVATIONS: Registry[type] = Registry(
    "observation", {"pooled": "sd_gym.envs.spaces:Pooled", "tokens": "sd_gym.envs.spaces:Tokens"}
)


def register_observation(name: str, observation: type) -> None:
    """Make an observation of your own known: then ``observation=name`` works in ``gym.make``, YAML files and ``--set``.

    Args:
        name: What it is called; a later one of the same name replaces it.
        observation: A subclass of ``sd_gym.envs.spaces.Observation``, such as of ``Standardised``, which only has to
            say what numbers an instance has.

    Raises:
        TypeError: If it is no such class.
        ValueError: If the name is one of the project's.
    """
    if not (isinstance(observation, type) and hasattr(observation, "observe")):
        raise TypeError(f"the observation {name!r} has to be a subclass of sd_gym.envs.spaces.Observation")
    OBSERVATIONS.register(name, observation)


def env_id(file: Path) -> str:
    """The Gymnasium id in a configuration file; raises ``ValueError`` if it has no line ``id: ...``."""
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {str(file)!r}")
    identity = _line(file, "id")
    if identity is None:
        raise ValueError(f"{file}: no line 'id: ...', such as 'id: My/Reviews-v0'")
    return identity


def is_of_table(file: Path) -> bool:
    """Whether the env of a configuration file looks up what decisions do: it has a line ``table: ...``."""
    return _line(file, "table") is not None


def _line(file: Path, key: str) -> str | None:
    """The value in the line of a key; reading lines, and no YAML, keeps ``import sd_gym`` fast."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():  # the rest is checked later
        if line.startswith(f"{key}:"):
            return line.removeprefix(f"{key}:").partition(" #")[0].strip(" \"'")
    return None


# A file without an id is only a base that others extend.
ENVS = Registry(
    "env", {env_id(file): file for file in sorted(CONFIG_FOLDER.glob("*.yaml")) if _line(file, "id") is not None}
)


SERVING = {env_id(file): file for file in sorted((CONFIG_FOLDER / "serving").glob("*.yaml"))}


def serving_file(identity: str) -> Path:
    """The configuration file of a serving env; raises ``ValueError`` if there is no such id."""
    if identity not in SERVING:
        raise UnknownNameError(unknown("serving env", identity, list(SERVING)))
    return SERVING[identity]


def config_files() -> list[Path]:
    """The configuration files, the bundled ones first."""
    return [ENVS.find(identity) for identity in ENVS.names()]


def config_of(identity: str) -> Path:
    """The configuration file of an id; raises ``ValueError`` if there is no such id."""
    return ENVS.find(identity)


def registered_ids() -> list[str]:
    """The ids of all sd_gym envs."""
    return ENVS.names()


def shipped_tables() -> dict[str, str]:
    """The envs whose tables are in the package: the folder of each by its id, as their YAML files name it."""
    bundled = [file for file in config_files() if file.parent == CONFIG_FOLDER]
    folders = {env_id(file): _line(file, "table") for file in bundled}
    return {identity: folder for identity, folder in folders.items() if folder not in (None, "null")}


def register_env(file: str | Path) -> str:
    """Make an env of your own, described in a YAML file as those of ``envs_configs/`` are, known to Gymnasium.

    Its ``dataset``, ``backbone`` and ``table`` may be paths from where the file lies; those that are passed to
    ``gym.make`` or ``--set`` are paths from the working directory, as always. The keys are checked when an env is made.

    Returns:
        Its id, for ``gym.make``, ``gym.make_vec`` and, with ``--import``, the command line. A file of the same id that
        was registered before is replaced.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no ``id``, or one that is taken by another env.
        gymnasium.error.Error: If the id is not of the form ``[NAMESPACE/]NAME[-vVERSION]``.
    """
    file = Path(file).expanduser().resolve()
    identity = env_id(file)
    parse_env_id(identity)
    if identity in gym.registry and identity not in ENVS.names():
        raise ValueError(f"{file}: the id {identity!r} is taken by another env of Gymnasium's registry")
    ENVS.register(identity, file)
    gym.registry.pop(identity, None)
    _register(identity)
    return identity


def register_envs() -> None:
    """Register the bundled envs with Gymnasium."""
    for identity in ENVS.names():
        _register(identity)
    for identity, file in SERVING.items():
        gym.register(
            identity,
            entry_point="sd_gym.envs.serving.shells:ServingEnv",
            vector_entry_point="sd_gym.envs.serving.shells:ServingVectorEnv",
            kwargs={"config_file": file.name},
        )


def _register(identity: str) -> None:
    file = ENVS.find(identity)
    of = "Table" if is_of_table(file) else "Switchable"
    gym.register(
        identity,
        entry_point=f"sd_gym.envs:{of}Env",
        vector_entry_point=f"sd_gym.envs:{of}VectorEnv",
        kwargs={"config_file": file.name if file.parent == CONFIG_FOLDER else str(file)},
    )
