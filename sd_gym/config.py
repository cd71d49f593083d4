"""The configuration of an env, in parts, and the spellings of its keys.

A key's full name is dotted: ``reward.epsilon``. A user may also write a mapping of its part,
``reward={"epsilon": 0.02}``, or its unique short name, ``epsilon``. Files hold nested mappings.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from sd_gym.errors import first_problem, short

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
Candidate = Literal["attention", "cross_attention", "feed_forward"]
CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)  # what may be skipped
# A mapping as sorted pairs, so that a configuration can be hashed: envs with the same one share their core.
Pairs = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(
        lambda value: tuple(sorted(value.items(), key=lambda pair: str(pair[0]))) if isinstance(value, dict) else value
    ),
]
ObjectiveFunction = Callable[..., NDArray[np.float64]]


def objective_name(objective: str | ObjectiveFunction) -> str:
    """The name of an objective; for a function, ``module:name``."""
    if isinstance(objective, str):
        return objective
    kind = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{kind.__module__}:{kind.__qualname__}"


# A name, or a function as for ``register_objective``, which is serialised by its name.
ObjectiveKey = Annotated[str | ObjectiveFunction, PlainSerializer(objective_name)]
LONGEST = 2**20  # tokens


class ConfigError(ValueError):
    """An invalid configuration; the message names the key and what was expected."""


class UnknownKeyError(ConfigError, TypeError):
    """An unknown key.

    It is also a ``TypeError``, like any unknown keyword in Python, because libraries try keywords and catch that error.
    """


class StrictModel(BaseModel):
    """Base class of user-written settings; it refuses unknown keys, and true, nan or 1e400 as a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``True``, which pydantic takes for the number 1, and which ``on`` and ``yes`` are in YAML."""
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool | np.bool_) for item in values):
            kinds = _kinds_of(cls.model_fields[info.field_name or ""].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError("expected a number, not true or false")
        return value


Config = TypeVar("Config", bound=StrictModel)


def _kinds_of(annotation: Any) -> set[Any]:
    return {annotation}.union(*map(_kinds_of, get_args(annotation)))


class DataConfig(StrictModel):
    """The data set."""

    dataset: str
    subset: str | None = None
    revision: str | None = None
    columns: Pairs = ()
    splits: Pairs = ()
    unanswerable: bool = True
    overlap: Literal["error", "drop", "allow"] = "error"
    policy_rows: Literal["new", "all"] = "new"
    policy_labels: Literal["given", "dense"] = "given"
    train_size: int | None = Field(default=None, ge=1)
    validation_size: int | None = Field(default=None, ge=1)
    test_size: int | None = Field(default=None, ge=1)

    def size(self, split: str) -> int | None:
        """Number of instances of a split that are used; ``None``: all."""
        return getattr(self, f"{split}_size")


class BackboneConfig(StrictModel):
    """The transformer whose computation is decided on, what it reads, and how it answers."""

    name: str
    device: str = "cpu"
    answers: Literal["generated", "extracted"] | None = None
    prompt: str | None = None
    stop: str | None = Field(default=None, min_length=1)
    max_source_length: int = Field(default=128, ge=1, le=LONGEST)
    max_target_length: int = Field(default=32, ge=1, le=LONGEST)
    num_beams: int = Field(default=1, ge=1)


class TokensConfig(StrictModel):
    """Which tokens of an input a decision may drop."""

    shares: tuple[float, ...] = (0.0,)
    ranking: str = "idf"


class QualityConfig(StrictModel):
    """How an answer's quality is measured."""

    kind: Literal["exact_match", "balanced", "likelihood", "metric", "agreement"] = "exact_match"
    metric: str = "exact_match"
    label_range: float = Field(default=1.0, gt=0)


class RewardConfig(StrictModel):
    """The reward of a decision."""

    objective: ObjectiveKey = "lexicographic"
    epsilon: float = Field(default=0.01, ge=0)
    penalty: float = Field(default=20.0, gt=0)
    cost_scale: float = Field(default=1.0, gt=0)
    gains: Literal["counted", "ignored"] = "counted"
    vector: bool = False
    dense: bool = False


class EnvConfig(StrictModel):
    """All keys of an env's configuration; ``envs_configs/base.yaml`` explains each of them."""

    id: str
    task: str
    data: DataConfig
    backbone: BackboneConfig
    split: SplitName = "train"
    candidates: tuple[Candidate, ...] = CANDIDATES
    tokens: TokensConfig = TokensConfig()
    quality: QualityConfig = QualityConfig()
    reward: RewardConfig = RewardConfig()
    action: Literal["multi_discrete", "multi_binary", "discrete"] = "multi_discrete"
    codebook: str | None = None
    observation: str = "pooled"
    stages: tuple[str, ...] = ("first",)
    table: str | None = None

    if TYPE_CHECKING:  # defined by pydantic, since the model is frozen

        def __hash__(self) -> int: ...


PARTS: dict[str, type[BaseModel]] = {
    name: part
    for name, part in get_type_hints(EnvConfig).items()
    if isinstance(part, type) and issubclass(part, StrictModel)
}
# Short names other than the last word of the key. Two of them are also names of parts: a mapping is the part, any
# other value is the key's.
_SHORT = {
    "backbone.name": "backbone",
    "tokens.shares": "token_shares",
    "tokens.ranking": "token_ranking",
    "quality.kind": "quality",
    "reward.vector": "vector_reward",
    "reward.dense": "dense_reward",
}
KEYS = tuple(  # all keys, dotted
    key
    for name in EnvConfig.model_fields
    for key in ([f"{name}.{inner}" for inner in PARTS[name].model_fields] if name in PARTS else [name])
)
_DOTTED = {_SHORT.get(key, key.rpartition(".")[2]): key for key in KEYS}  # by short name


def is_key(name: str) -> bool:
    """Whether a name is a key, in any spelling, or a part."""
    return name in KEYS or name in _DOTTED or name in PARTS


def dotted(values: Mapping[str, Any], origin: str = "the config") -> dict[str, Any]:
    """Values by dotted key, from keys in any spelling; the values are not checked.

    Raises ``UnknownKeyError``, or ``ConfigError`` if a key has two values or a part is not a mapping.
    """
    by_key: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    for key, name, value in _each(values, origin):
        if key in by_key and not np.array_equal(by_key[key], value):
            raise ConfigError(
                f"{origin}: config key {key!r} has two values: {spellings[key]!r} is {short(by_key[key])}, and "
                f"{name!r} is {short(value)}; leave one of them out"
            )
        by_key[key], spellings[key] = value, name
    return by_key


def stored_config(values: Mapping[str, Any], origin: str) -> EnvConfig:
    """The configuration in a file of a run; missing keys have their defaults.

    It was checked when it was written, so the data, backbone and objective need not exist here. Raises ``ConfigError``.
    """
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in dotted(values, origin).items()}
    needed = {name: {} for name, part in PARTS.items() if any(key.is_required() for key in part.model_fields.values())}
    return validated(EnvConfig, {**needed, **nested(plain)}, origin)


def validated(kind: type[Config], values: Mapping[str, Any], origin: str) -> Config:
    """A configuration of values; ``ConfigError`` with the key and the problem if they do not fit."""
    try:
        return kind(**values)
    except ValidationError as error:
        key, problem = first_problem(error)
        raise ConfigError(f"{origin}: config key {key!r}: {problem}") from error


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as nested mappings, one per part."""
    parts: dict[str, Any] = {}
    for key, value in values.items():
        part, _, inner = key.rpartition(".")
        (parts.setdefault(part, {}) if part else parts)[inner] = value
    return parts


def _each(values: Mapping[str, Any], origin: str) -> Iterator[tuple[str, str, Any]]:
    """Dotted key, spelling and value of each key."""
    for name, value in values.items():
        if name in PARTS and isinstance(value, Mapping):
            for inner, inner_value in value.items():
                key = f"{name}.{inner}"
                if key not in KEYS:
                    raise _unknown(key, name, origin)
                yield key, key, inner_value
        elif name in KEYS or name in _DOTTED:
            yield _DOTTED.get(name, name), name, value
        elif name in PARTS:
            raise ConfigError(
                f"{origin}: config key {name!r}: expected a mapping with keys of "
                f"{', '.join(PARTS[name].model_fields)}; got {short(value)}"
            )
        else:
            raise _unknown(name, name, origin)


def _unknown(key: Any, keyword: Any, origin: str) -> UnknownKeyError:
    near = difflib.get_close_matches(str(key), [*KEYS, *_DOTTED], n=1)
    hint = f"; did you mean {_DOTTED.get(near[0], near[0])!r}?" if near else "."
    # TorchRL recognises an unknown keyword by Python's own words, so they are part of the message.
    return UnknownKeyError(
        f"{origin}: unknown config key {key!r}{hint} Known keys: {', '.join(KEYS)} (unexpected keyword argument "
        f"{keyword!r})."
    )
