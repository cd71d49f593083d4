"""Reading and checking the configuration of an env: one YAML file per env, each key can be overridden."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from sd_gym.config import KEYS, ConfigError, EnvConfig, dotted, stored_config
from sd_gym.envs.table_files import read_description, table_folder
from sd_gym.errors import one_line, short
from sd_gym.objectives import Objective
from sd_gym.registration import CONFIG_FOLDER

# What can be chosen of an env that takes its outcomes from a table; all else is as it was when the table was made. Of
# several stages the first one alone may be left.
TABLE_KEYS = ("split", "stages", *(key for key in KEYS if key.startswith("reward.") and key != "reward.dense"))
EXTENDS = "extends"  # the key of a YAML file that names another one, whose keys hold where it says nothing


def make_config(values: Mapping[str, Any], origin: str) -> EnvConfig:
    """Check the values of a configuration, however its keys are spelled; raises ``ConfigError``."""
    values = dotted(values, origin)
    if ("table" in values and "task" not in values) or values.get("table") is not None:
        return _table_config(values, origin)
    for key, example in (("data.dataset", "dataset"), ("backbone.name", "backbone")):
        if values.get(key, "") is None:
            raise ConfigError(
                f"{origin}: {example!r} has no value; pass it, as in "
                f"gym.make({values.get('id', 'ID')!r}, dataset='reviews.jsonl', backbone='my-model')"
            )
    from sd_gym.execution.config import checked_config  # for which torch is imported; an env of a table needs none

    return checked_config(values, origin)


def _table_config(values: dict[str, Any], origin: str) -> EnvConfig:
    """The configuration of the env that a table is of, but for ``TABLE_KEYS``; ``None`` is as the table has it."""
    if values.get("table") is None:
        raise ConfigError(
            f"{origin}: 'table' has no value; pass the folder of one, as in gym.make({values.get('id', 'ID')!r}, "
            "table='my-table'); sd-gym tabulate ENV --output my-table makes one"
        )
    if not isinstance(values["table"], str | Path):
        raise ConfigError(f"{origin}: config key 'table': expected the folder of a table; got {short(values['table'])}")
    was = dotted(read_description(table_folder(values["table"]))["env_config"], f"the table {values['table']}")
    given = {key: value for key, value in values.items() if value is not None}
    config = stored_config({**was, **given}, origin)
    before = dotted(stored_config({**was, "id": config.id, "table": config.table}, origin).model_dump())
    for key, value in dotted(config.model_dump()).items():
        at_once = key == "stages" and list(value) == ["first"]
        if value != before[key] and not at_once and (key == "stages" or key not in TABLE_KEYS):
            raise ConfigError(
                f"{origin}: config key {key!r}: the table {config.table} is of {short(before[key])}, got "
                f"{short(value)}; of a table only {', '.join(TABLE_KEYS)} can be chosen, for anything else make "
                "another one (sd-gym tabulate)"
            )
    try:
        Objective(config.reward)
    except ValueError as error:
        raise ConfigError(f"{origin}: config key 'reward.objective': {error}") from error
    return config


def load_config(file: str | Path, overrides: Mapping[str, Any]) -> EnvConfig:
    """The configuration of a YAML file with some keys overridden.

    The file's own ``dataset``, ``backbone``, ``codebook`` and ``table`` may be paths from where it lies: what begins
    with a dot, or is there.
    Raises ``FileNotFoundError``, or ``ConfigError`` if a key or value is wrong.
    """
    file = Path(file)
    values = located_values(file)
    origin = str(values.get("id", file))
    if overrides.get("table") is not None and "table" not in values:
        raise ConfigError(
            f"{origin}: config key 'table': this env computes what decisions do; it is the env SD/Table-v0 that takes "
            "the folder of a table"
        )
    return make_config({**values, **dotted(overrides, origin)}, origin)


def located_values(file: Path) -> dict[str, Any]:
    """``read_values``, with paths that are relative to a file of one's own made absolute."""
    values = read_values(file)
    for key in ("data.dataset", "backbone.name", "codebook", "table") if file.parent != CONFIG_FOLDER else ():
        if isinstance(value := values.get(key), str) and (value.startswith(".") or (file.parent / value).exists()):
            values[key] = str((file.parent / value).resolve())
    return values


def read_values(file: Path) -> dict[str, Any]:
    """The values of a YAML file by dotted key, not yet checked, on top of those of the file that it ``extends``.

    That file may extend another one. It is named without a folder: it is in the same folder, or in the package.
    Raises ``FileNotFoundError``, or ``ConfigError`` of a file that is damaged, or extends none or itself.
    """
    values: dict[str, Any] = {}
    chain: list[Path] = []
    next_file: Path | None = file
    while next_file is not None:
        chain.append(next_file)
        own = read_yaml(next_file)
        next_file = _base_file(chain, own.pop(EXTENDS)) if EXTENDS in own else None
        values = {**dotted(own, str(own.get("id", chain[-1]))), **values}
    return values


def _base_file(chain: list[Path], name: Any) -> Path:
    """The file that the last one of a chain extends."""
    file = chain[-1]
    if not isinstance(name, str) or Path(name).name != name:
        raise ConfigError(
            f"{file}: {EXTENDS!r} takes the name of a YAML file, as classification_mini.yaml; got {short(name)}"
        )
    candidates = [file.parent / name, CONFIG_FOLDER / name]
    base = next((path for path in candidates if path.is_file()), None)
    if base is None:
        raise ConfigError(f"{file} extends {name!r}, which is neither in {file.parent} nor in the package")
    if base in chain:
        circle = " -> ".join(path.name for path in [*chain, base])
        raise ConfigError(
            f"{chain[0]}: the files extend each other in a circle ({circle}); end it with one that does not"
        )
    return base


def read_yaml(file: Path) -> dict[str, Any]:
    """What a YAML file of keys and values says; raises ``FileNotFoundError``, or ``ConfigError`` if it is no such."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from error
    values = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected lines such as 'id: My/Reviews-v0', got {short(values)}")
    return values


class _Loader(yaml.SafeLoader):
    """Reads plain values, 1e-3 among them as a number, and no aliases: a few lines of them make a value of any size."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ComposerError(
                None, None, f"the alias *{alias.anchor} is not read here; write its value out", alias.start_mark
            )
        return super().compose_node(parent, index)


# YAML 1.1, as PyYAML reads it, takes 1e-3 for a word: its numbers have a dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, origin: str) -> Any:
    """What a YAML text says; raises ``ConfigError`` if it is no YAML, or has aliases (``*name``)."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers and dates raise the second
        raise ConfigError(f"{origin}: not YAML ({one_line(error)})") from error
