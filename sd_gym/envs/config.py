"""What an env is made of; one YAML file of ``envs_configs/`` an env, every key overridable in ``gym.make``."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from sd_gym.errors import one_line, short
from sd_gym.objectives import NO_LAGRANGIAN, Objective, ObjectiveFunction, objective_function, objective_name
from sd_gym.registration import CONFIG_FOLDER, OBSERVATIONS
from sd_gym.tasks.data import SPLITS, DataError, Source
from sd_gym.tasks.family import TASKS
from sd_gym.tasks.metrics import METRICS
from sd_gym.tasks.splits import Splits

SplitName = Literal["train", "validation", "test"]
Kind = Literal["attention", "cross_attention", "feed_forward"]
KINDS: tuple[Kind, ...] = ("attention", "cross_attention", "feed_forward")  # of sublayers
# A mapping as sorted pairs, since a configuration is hashed: envs of the same one share their core.
Pairs = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(
        lambda value: tuple(sorted(value.items(), key=lambda pair: str(pair[0]))) if isinstance(value, dict) else value
    ),
]
# A name, or a function as ``register_objective`` takes it, which is written by its name.
ObjectiveKey = Annotated[str | ObjectiveFunction, PlainSerializer(objective_name)]

LONGEST = 2**20  # tokens
# What can be chosen of an env that takes its outcomes from a table; all else is as it was when the table was made.
TABLE_KEYS = (
    "split",
    "objective",
    "epsilon",
    "penalty",
    "cost_scale",
    "vector_reward",
)
EXTENDS = "extends"  # the key of a YAML file that names another one, whose keys hold where it says nothing


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what was expected."""


class UnknownKeyError(ConfigError, TypeError):
    """A key that no configuration has.

    Also a ``TypeError``, as any unknown keyword in Python: libraries try a keyword of theirs and catch that.
    """


class EnvConfig(BaseModel):
    """All keys of an env's configuration. The YAML files in ``envs_configs/`` explain each one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    task: str
    dataset: str
    subset: str | None = None
    revision: str | None = None
    columns: Pairs = ()
    splits: Pairs = ()
    unanswerable: bool = True
    overlap: Literal["error", "drop", "allow"] = "error"
    backbone: str
    prompt: str | None = None
    stop: str | None = Field(default=None, min_length=1)
    answers: Literal["generated", "extracted"] | None = None
    split: SplitName = "train"
    train_size: int | None = Field(default=None, ge=1)
    validation_size: int | None = Field(default=None, ge=1)
    test_size: int | None = Field(default=None, ge=1)
    max_source_length: int = Field(default=128, ge=1, le=LONGEST)
    max_target_length: int = Field(default=32, ge=1, le=LONGEST)
    candidates: tuple[Kind, ...] = KINDS
    token_shares: tuple[float, ...] = (0.0,)
    token_ranking: str = "idf"
    metric: str = "exact_match"
    quality: Literal["exact_match", "balanced", "likelihood", "metric"] = "exact_match"
    num_beams: int = Field(default=1, ge=1)
    label_range: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    objective: ObjectiveKey = "lexicographic"
    epsilon: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    penalty: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    cost_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    action: Literal["multi_discrete", "multi_binary", "discrete"] = "multi_discrete"
    codebook: str | None = None
    observation: str = "pooled"
    vector_reward: bool = False
    stages: tuple[str, ...] = ("first",)
    dense_reward: bool = False
    device: str = "cpu"
    table: str | None = None

    @property
    def source(self) -> Source:
        """Where the data set is."""
        return Source(
            self.dataset,
            self.subset,
            self.revision,
            dict(self.columns),
            dict(self.splits),
            self.unanswerable,
            self.overlap,
        )

    def data(self) -> Splits:
        """The splits of the data set; nothing is read yet."""
        return Splits(self.source, self.task, {name: self.size_of(name) for name in SPLITS})

    def make_objective(self) -> Objective:
        """The objective."""
        return Objective(self.objective, epsilon=self.epsilon, penalty=self.penalty, cost_scale=self.cost_scale)

    def size_of(self, split: str) -> int | None:
        """How many instances of a split are used; ``None``: all."""
        return getattr(self, f"{split}_size")


def make_config(values: dict[str, Any], origin: str) -> EnvConfig:
    """Check the values of a configuration.

    Raises:
        UnknownKeyError: Naming the key and the nearest known one.
        ConfigError: Naming the key, what was expected and what came.
    """
    for key in values:
        if key == "multiplier_rate":
            raise UnknownKeyError(f"{origin}: config key 'multiplier_rate': {NO_LAGRANGIAN}")
        if key not in EnvConfig.model_fields:
            near = difflib.get_close_matches(str(key), EnvConfig.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            # TorchRL tells an unknown keyword from other errors by Python's own words, which are therefore in it.
            raise UnknownKeyError(
                f"{origin}: unknown config key {key!r}{hint} Known keys: {', '.join(EnvConfig.model_fields)} "
                f"(unexpected keyword argument {key!r})."
            )
    if ("table" in values and "task" not in values) or values.get("table") is not None:
        return _table_config(values, origin)
    for key in ("dataset", "backbone"):
        if values.get(key, "") is None:
            raise ConfigError(
                f"{origin}: {key!r} has no value; pass it, as in "
                f"gym.make({values.get('id', 'ID')!r}, dataset='reviews.jsonl', backbone='my-model')"
            )
    config = _validated(values, origin)
    try:
        config.source  # noqa: B018  (says what is wrong with the splits)
    except DataError as error:
        raise ConfigError(f"{origin}: config key {error}") from error
    from sd_gym.tasks.ranking import RANKINGS  # for which torch is imported; an env of a table needs none

    named = {
        "objective": objective_function,
        "observation": OBSERVATIONS.find,
        "task": TASKS.find,
        "metric": METRICS.find,
        "token_ranking": RANKINGS.find,
    }
    for key, find in named.items():
        try:
            find(getattr(config, key))
        except ValueError as error:
            raise ConfigError(f"{origin}: config key {key!r}: {error}") from error
    _check_measured(config, origin)
    shares = config.token_shares
    if shares[:1] != (0.0,) or list(shares) != sorted(set(shares)) or shares[-1] >= 1:
        raise ConfigError(
            f"{origin}: config key 'token_shares': expected ascending shares below 1, the first one 0.0 (no token is "
            f"dropped), as in [0.0, 0.25, 0.5]; got {list(shares)}"
        )
    if not config.candidates and len(shares) == 1:
        raise ConfigError(
            f"{origin}: config key 'candidates': with no kind of sublayer there are only tokens to drop, and "
            f"token_shares has one level, {list(shares)}; name a kind, or pass token_shares=[0.0, 0.25, 0.5]"
        )
    if set(config.candidates) != set(KINDS) and (config.action == "multi_binary" or config.stages != ("first",)):
        raise ConfigError(
            f"{origin}: config key 'candidates': some kinds of sublayers alone are decided on with action "
            f"multi_discrete or discrete, before the first layer; got action {config.action} at {list(config.stages)}"
        )
    if config.action == "multi_binary" and len(shares) > 1:
        raise ConfigError(
            f"{origin}: config key 'action': 'multi_binary' has a bit for each switch and none for the tokens, but "
            f"there are {len(shares)} token_shares; use multi_discrete, or discrete with a codebook"
        )
    if config.stages != ("first",) and (config.action == "discrete" or config.observation != "pooled"):
        raise ConfigError(
            f"{origin}: config key 'stages': several stages are decided with action multi_discrete or multi_binary, on "
            f"observation pooled; got {config.action} on {config.observation}"
        )
    if config.dense_reward and config.vector_reward:
        raise ConfigError(
            f"{origin}: config key 'dense_reward': a vector_reward comes at the end; leave one of the two out"
        )
    return config


def _validated(values: dict[str, Any], origin: str) -> EnvConfig:
    try:
        return EnvConfig(**{key: str(value) if isinstance(value, Path) else value for key, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{origin}: config key {key!r}: {first['msg']}, got {short(first['input'])}") from error


def _table_config(values: dict[str, Any], origin: str) -> EnvConfig:
    """The configuration of the env that a table is of, but for ``TABLE_KEYS``; ``None`` is as the table has it."""
    from sd_gym.envs.table import read_description, table_folder

    if values.get("table") is None:
        raise ConfigError(
            f"{origin}: 'table' has no value; pass the folder of one, as in gym.make({values.get('id', 'ID')!r}, "
            "table='my-table'); sd-gym tabulate ENV --output my-table makes one"
        )
    if not isinstance(values["table"], str | Path):
        raise ConfigError(f"{origin}: config key 'table': expected the folder of a table; got {short(values['table'])}")
    was = read_description(table_folder(values["table"]))["env_config"]
    given = {key: value for key, value in values.items() if value is not None}
    config = _validated({**was, **given}, origin)
    before = _validated({**was, "id": config.id, "table": config.table}, origin)
    for key in EnvConfig.model_fields:
        if key not in TABLE_KEYS and getattr(config, key) != getattr(before, key):
            raise ConfigError(
                f"{origin}: config key {key!r}: the table {config.table} is of {getattr(before, key)!r}, got "
                f"{getattr(config, key)!r}; of a table only {', '.join(TABLE_KEYS)} can be chosen, for anything else "
                "make another one (sd-gym tabulate)"
            )
    try:
        objective_function(config.objective)
    except ValueError as error:
        raise ConfigError(f"{origin}: config key 'objective': {error}") from error
    return config


def _check_measured(config: EnvConfig, origin: str) -> None:
    """Raise ``ConfigError`` if the task has no such metric or quality."""
    task, metric = TASKS.find(config.task), METRICS.find(config.metric)
    if config.metric not in task.metrics and not metric.own:
        raise ConfigError(
            f"{origin}: config key 'metric': {config.task} is measured by {', '.join(task.metrics)}; got "
            f"{config.metric!r}"
        )
    if config.quality == "metric" and (config.metric == "exact_match" or not metric.of_texts):
        raise ConfigError(
            f"{origin}: config key 'quality': 'metric' scores texts, by rouge or squad; the metric "
            f"is {config.metric!r}, for which exact_match, likelihood and, of classes, balanced are there"
        )
    if config.quality == "balanced" and not task.weighs_classes:
        raise ConfigError(f"{origin}: config key 'quality': 'balanced' weighs classes; {config.task} has none")


def load_config(file: str | Path, overrides: dict[str, Any]) -> EnvConfig:
    """The configuration of a YAML file with some keys overridden.

    The file's own ``dataset``, ``backbone``, ``codebook`` and ``table`` may be paths from where it lies: what begins
    with a dot, or is there.

    Raises:
        FileNotFoundError: If there is no such file.
        ConfigError: If a key or value is wrong.
    """
    file = Path(file)
    values = read_values(file)
    if overrides.get("table") is not None and "table" not in values:
        raise ConfigError(
            f"{values.get('id', file)}: config key 'table': this env computes what decisions do; it is the env "
            "SD/Table-v0 that takes the folder of a table"
        )
    for key in ("dataset", "backbone", "codebook", "table") if file.parent != CONFIG_FOLDER else ():
        if isinstance(value := values.get(key), str) and (value.startswith(".") or (file.parent / value).exists()):
            values[key] = str((file.parent / value).resolve())
    return make_config({**values, **overrides}, str(values.get("id", file)))


def read_values(file: Path) -> dict[str, Any]:
    """The keys of a YAML file, not yet checked, and those of the file that it ``extends``.

    That one is called by its name alone: it lies beside the file, or is the package's.

    Raises:
        FileNotFoundError: If there is no such file.
        ConfigError: If one is not UTF-8, no YAML, or something else than keys and values, or extends wrongly.
    """
    values = _read_keys(file)
    if EXTENDS not in values:
        return values
    name = values.pop(EXTENDS)
    if not isinstance(name, str) or Path(name).name != name:
        raise ConfigError(
            f"{file}: {EXTENDS!r} takes the name of a YAML file, as classification_mini.yaml; got {name!r}"
        )
    beside = file.parent / name
    base = _read_keys(beside if beside.is_file() else CONFIG_FOLDER / name)
    if EXTENDS in base:
        raise ConfigError(f"{file} extends {name}, which extends another file; name that one")
    return {**base, **values}


def _read_keys(file: Path) -> dict[str, Any]:
    """As ``read_values``, of one file."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from error
    values = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected lines such as 'id: My/Reviews-v0', got {short(values)}")
    return values


def parse_yaml(text: str, origin: str) -> Any:
    """What a YAML text says.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers and dates raise the second
        raise ConfigError(f"{origin}: not YAML ({one_line(error)})") from error
