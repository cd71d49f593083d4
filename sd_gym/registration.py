"""Registers every YAML file of ``envs_configs/`` with an ``id`` as a Gymnasium env; it imports nothing slow."""

import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import parse_env_id

from sd_gym.registry import Registry, UnknownNameError, unknown

CONFIG_FOLDER = Path(str(files("sd_gym.envs_configs")))
NULLS = "", "~", "null", "Null", "NULL"  # how YAML writes that a key has no value
OBSERVATIONS: Registry[type] = Registry(
    "observation", {"pooled": "sd_gym.envs.spaces:Pooled", "tokens": "sd_gym.envs.spaces:Tokens"}
)


def register_observation(name: str, observation: type) -> None:
    """Register your own observation, so that ``observation=name`` works in ``gym.make``, YAML files and ``--set``.

    Args:
        name: Name of the observation; a later one of the same name replaces it.
        observation: A subclass of ``sd_gym.envs.spaces.Observation``, or of its subclass ``Standardised``, which only
            needs the numbers of an instance.

    Raises:
        TypeError: If it is not such a class.
        ValueError: If the name is built in.
    """
    if not (isinstance(observation, type) and hasattr(observation, "observe")):
        raise TypeError(f"the observation {name!r} must be a subclass of sd_gym.envs.spaces.Observation")
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
    """Whether the env of a configuration file is a table env; see ``sd_gym.envs.config.is_table``."""
    table = _inherited(file, "table")
    return table is not None and (table not in NULLS or _inherited(file, "task") is None)


def _inherited(file: Path, key: str) -> str | None:
    """``_line`` of a file, or of the first file in its chain of ``extends`` that has the key."""
    files = [file]
    while (value := _line(files[-1], key)) is None:
        name = _line(files[-1], "extends")
        places = [] if name is None else [files[-1].parent / name, CONFIG_FOLDER / name]
        base = next((place for place in places if place.is_file()), None)
        if base is None or base in files:
            return None
        files.append(base)
    return value


def _line(file: Path, key: str) -> str | None:
    """The value in the line of a key; parsing no YAML keeps ``import sd_gym`` fast."""
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():  # the YAML is checked later
        if line.startswith(f"{key}:"):
            return line.removeprefix(f"{key}:").partition(" #")[0].strip(" \"'")
    return None


# The configuration files of envs, by id. Files without an id are only bases that others extend.
ENVS = Registry(
    "env", {env_id(file): file for file in sorted(CONFIG_FOLDER.glob("*.yaml")) if _line(file, "id") is not None}
)
SERVING = Registry("serving env", {env_id(file): file for file in sorted((CONFIG_FOLDER / "serving").glob("*.yaml"))})


def config_of(identity: str) -> Path:
    """The configuration file of an id; raises ``ValueError`` if there is no such id, or if it is a serving env's."""
    identity = plain_id(identity)
    if identity in SERVING:
        raise ValueError(serving_env_refused(identity))
    if identity not in ENVS:
        raise UnknownNameError(unknown("env", identity, all_ids()))
    return ENVS.find(identity)


def plain_id(identity: str) -> str:
    """An id without the module that ``gym.make("sd_gym:ID")`` imports."""
    return identity.removeprefix("sd_gym:")


def serving_env_refused(identity: str) -> str:
    """The message of a command that needs an env of decisions and got a serving env."""
    return f"{identity} is a serving env, which only train, compare and serve --dial take"


def registered_ids() -> list[str]:
    """The ids of all envs of decisions."""
    return ENVS.names()


def all_ids() -> list[str]:
    """The ids of all envs, serving envs included."""
    return [*registered_ids(), *SERVING.names()]


def shipped_tables() -> dict[str, str]:
    """Folders of the tables in the package, by env id."""
    folders = {identity: _line(config_of(identity), "table") for identity in ENVS.built_in()}
    return {identity: folder for identity, folder in folders.items() if folder not in (None, *NULLS)}


def register_env(file: str | Path) -> str:
    """Register your own env with Gymnasium, from a YAML file like those of ``envs_configs/``.

    A file with ``points`` is that of a serving env. Its ``dataset``, ``backbone``, ``table`` and ``policy`` may be
    paths relative to the file. Paths in ``gym.make`` or ``--set`` are relative to the working directory. The keys are
    checked when an env is made.

    Returns:
        Its id, for ``gym.make``, ``gym.make_vec`` and the command line (``--import FILE``). It replaces an earlier file
        of the same id.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no ``id``, or another env has the same.
        gymnasium.error.Error: If the id is not of the form ``[NAMESPACE/]NAME[-vVERSION]``.
    """
    file = Path(file).expanduser().resolve()
    identity = env_id(file)
    parse_env_id(identity)
    known = ENVS if _line(file, "points") is None else SERVING
    if identity in gym.registry and identity not in known:
        raise ValueError(f"{file}: the id {identity!r} is taken by another env of Gymnasium's registry")
    known.register(identity, file)  # raises if the id is built in
    gym.registry.pop(identity, None)
    _register(identity)
    return identity


def register_envs() -> None:
    """Register the bundled envs with Gymnasium."""
    for identity in all_ids():
        _register(identity)


def _register(identity: str) -> None:
    file = (SERVING if identity in SERVING else ENVS).find(identity)
    kind = "Table" if is_of_table(file) else "Switchable"
    env = "sd_gym.envs.serving.shells:Serving" if identity in SERVING else f"sd_gym.envs:{kind}"
    gym.register(
        identity,
        entry_point=f"{env}Env",
        vector_entry_point=f"{env}VectorEnv",
        kwargs={"config_file": file.name if CONFIG_FOLDER in file.parents else str(file)},
    )


def import_own(name: str) -> str:
    """Import a user's module, by name or path, for what it registers; or register the env of a YAML file.

    It may import modules in its folder, as if it ran as a script; installed modules have precedence. Returns the name,
    or the absolute path of the file. Raises ``FileNotFoundError`` if there is no such module or file, ``ValueError`` if
    an installed module has the file's name; for a YAML file, as ``register_env``.
    """
    if name.endswith((".yaml", ".yml")):
        register_env(name)
        return str(Path(name).expanduser().resolve())
    if not name.endswith(".py"):
        _also_from(Path.cwd())
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name + ".").startswith(error.name + "."):
                raise  # the module imports a missing one
            raise FileNotFoundError(
                f"no module {name!r} to import; expected one that can be imported from here, or the path of a .py file"
            ) from error
        return name
    file = Path(name).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no file {name!r} to import")
    _also_from(file.parent)
    module: Any = import_module(file.stem)
    if Path(module.__file__ or "").resolve() != file:
        raise ValueError(f"cannot import {name!r}: there is another module {file.stem!r}; rename the file")
    return str(file)


def _also_from(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
