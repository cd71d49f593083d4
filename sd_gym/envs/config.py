"""Read and check the configuration of an env: a YAML file whose keys can be overridden."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from sd_gym.config import KEYS, ConfigError, EnvConfig, dotted, stored_config
from sd_gym.envs.table_files import read_table, table_folder
from sd_gym.errors import one_line, short
from sd_gym.objectives import Objective
from sd_gym.registration import CONFIG_FOLDER

# Keys that can be overridden for a table env; all others are as in the original env. ``stages`` can only become
# ["first"].
TABLE_KEYS = ("split", "stages", *(key for key in KEYS if key.startswith("reward.") and key != "reward.dense"))
PATHS = "data.dataset", "backbone.name", "codebook", "table"  # the keys whose values may be paths
EXTENDS = "extends"  # the key of a YAML file that names the file with the values of missing keys


def make_config(values: Mapping[str, Any], origin: str) -> EnvConfig:
    """Check the values of a configuration, in any spelling of the keys; raises ``ConfigError``."""
    values = dotted(values, origin)
    if is_table(values):
        return _table_config(values, origin)
    for key, example in (("data.dataset", "dataset"), ("backbone.name", "backbone")):
        if values.get(key, "") is None:
            raise ConfigError(
                f"{origin}: {example!r} has no value; pass it, as in "
                f"gym.make({values.get('id', 'ID')!r}, dataset='reviews.jsonl', backbone='my-model'), or on the "
                "command line --set dataset=reviews.jsonl --set backbone=my-model"
            )
    from sd_gym.execution.config import checked_config  # imports torch, which an env of a table does not need

    return checked_config(values, origin)


def is_table(values: Mapping[str, Any]) -> bool:
    """Whether values by dotted key are those of a table env: they have a ``table``, or its key and no ``task``."""
    return values.get("table") is not None or ("table" in values and "task" not in values)


def _table_config(values: dict[str, Any], origin: str) -> EnvConfig:
    """The configuration of the original env, with the ``TABLE_KEYS`` that are not ``None`` replaced."""
    if values.get("table") is None:
        raise ConfigError(
            f"{origin}: 'table' has no value; pass the folder of one, as in gym.make({values.get('id', 'ID')!r}, "
            "table='my-table'), or on the command line --set table=my-table; sd-gym tabulate ENV --output my-table "
            "makes one"
        )
    if not isinstance(values["table"], str | Path):
        raise ConfigError(f"{origin}: config key 'table': expected the folder of a table; got {short(values['table'])}")
    original = dotted(read_table(table_folder(values["table"]))["env_config"], f"the table {values['table']}")
    given = {key: value for key, value in values.items() if value is not None}
    config = stored_config({**original, **given}, origin)
    before = dotted(stored_config({**original, "id": config.id, "table": config.table}, origin).model_dump())
    for key, value in dotted(config.model_dump()).items():
        at_once = key == "stages" and list(value) == ["first"]
        if value != before[key] and not at_once and (key == "stages" or key not in TABLE_KEYS):
            raise ConfigError(
                f"{origin}: config key {key!r}: the table {config.table} was made with {short(before[key])}, got "
                f"{short(value)}; only {', '.join(TABLE_KEYS)} can be chosen for a table. For anything else make "
                "another table (sd-gym tabulate)"
            )
    try:
        Objective(config.reward)
    except ValueError as error:
        raise ConfigError(f"{origin}: config key 'reward.objective': {error}") from error
    return config


def load_config(file: str | Path, overrides: Mapping[str, Any]) -> EnvConfig:
    """The configuration of a YAML file, in ``envs_configs/`` or elsewhere, with some keys overridden.

    The file's own ``dataset``, ``backbone``, ``codebook`` and ``table`` may be paths relative to the file, if they
    begin with a dot or exist there.

    Raises:
        FileNotFoundError: If the file does not exist.
        ConfigError: If a key or value is wrong.
    """
    bundled = CONFIG_FOLDER / file
    values = read_values(bundled if bundled.is_file() else Path(file))
    origin = str(values.get("id", file))
    if overrides.get("table") is not None and not is_table(values):
        raise ConfigError(
            f"{origin}: config key 'table': this env computes outcomes and takes no table; for a folder with a table, "
            "use SD/Table-v0"
        )
    return make_config({**values, **dotted(overrides, origin)}, origin)


def with_absolute_paths(values: dict[str, Any], file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The values of a file; paths under ``keys`` that are relative to a user's file are made absolute."""
    for key in keys if CONFIG_FOLDER not in file.parents else ():
        if isinstance(value := values.get(key), str) and (value.startswith(".") or (file.parent / value).exists()):
            values[key] = str((file.parent / value).resolve())
    return values


def read_values(file: Path, extending: Sequence[Path] = ()) -> dict[str, Any]:
    """The unchecked values of a YAML file by dotted key, merged into those of the file that it ``extends``.

    That file may extend another one. It is a name without a folder: a file in the same folder, or in the package. Paths
    that are relative to a user's file are absolute.

    Raises:
        FileNotFoundError: If the file does not exist.
        ConfigError: If a file is malformed, or extends a missing file or itself.
    """
    own = read_yaml(file)
    chain = [*extending, file]  # the files that extend each other
    base = read_values(_base_file(chain, own.pop(EXTENDS)), chain) if EXTENDS in own else {}
    return {**base, **with_absolute_paths(dotted(own, str(own.get("id", file))), file, PATHS)}


def _base_file(chain: list[Path], name: Any) -> Path:
    file = chain[-1]
    if not isinstance(name, str) or Path(name).name != name:
        raise ConfigError(
            f"{file}: {EXTENDS!r}: expected the name of a YAML file, as classification_mini.yaml; got {short(name)}"
        )
    candidates = [file.parent / name, CONFIG_FOLDER / name]
    base = next((path for path in candidates if path.is_file()), None)
    if base is None:
        raise ConfigError(f"{file} extends {name!r}, which is neither in {file.parent} nor in the package")
    if base in chain:
        circle = " -> ".join(path.name for path in [*chain, base])
        raise ConfigError(f"{chain[0]}: the files extend each other in a circle ({circle}); remove one 'extends'")
    return base


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ``FileNotFoundError``, or ``ConfigError`` if it is malformed."""
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
    """Reads 1e-3 as a number, and refuses repeated keys, and aliases: a few of them can make a value of any size."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ComposerError(
                None, None, f"the alias *{alias.anchor} is not supported; write its value out", alias.start_mark
            )
        node = super().compose_node(parent, index)
        keys = set[tuple[str, str]]()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if (name := (key.tag, str(key.value))) in keys:
                raise ComposerError(None, None, f"the key {key.value!r} is given twice; keep one", key.start_mark)
            keys.add(name)
        return node


# PyYAML follows YAML 1.1, where 1e-3 is a string, as it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text; raises ``ConfigError`` if it is not YAML, or has aliases (``*name``) or a key twice."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: malformed numbers and dates
        hint = """; a text with ':' or '{' has to be in quotes, as in 'prompt="{source} Summary:"'"""
        hint = "" if isinstance(error, ComposerError) else hint
        raise ConfigError(f"{origin}: not YAML ({one_line(error)}){hint}") from error
