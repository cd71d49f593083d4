"""What an env is made of, in parts that are passed whole, and how their keys are spelled.

A key's name is dotted, ``reward.epsilon``. It may be given so, in a mapping of its part, ``reward={"epsilon": 0.02}``,
or by its short name, ``epsilon``, which no other key has. What is written down is nested.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

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

from sd_gym.errors import short

SplitName = Literal["train", "validation", "test"]
Candidate = Literal["attention", "cross_attention", "feed_forward"]
CANDIDATES: tuple[Candidate, ...] = ("attention", "cross_attention", "feed_forward")  # what may be skipped
# A mapping as sorted pairs, since a configuration is hashed: envs of the same one share their core.
Pairs = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(
        lambda value: tuple(sorted(value.items(), key=lambda pair: str(pair[0]))) if isinstance(value, dict) else value
    ),
]
ObjectiveFunction = Callable[..., NDArray[np.float64]]


def objective_name(objective: str | ObjectiveFunction) -> str:
    """The name, or ``module:name`` of a function that was given itself."""
    if isinstance(objective, str):
        return objective
    kind = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{kind.__module__}:{kind.__qualname__}"


# A name, or a function as ``register_objective`` takes it, which is written by its name.
ObjectiveKey = Annotated[str | ObjectiveFunction, PlainSerializer(objective_name)]
LONGEST = 2**20  # tokens


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what was expected."""


class UnknownKeyError(ConfigError, TypeError):
    """A key that no configuration has.

    Also a ``TypeError``, as any unknown keyword in Python: libraries try a keyword of theirs and catch that.
    """


class StrictModel(BaseModel):
    """Keys and values that a user writes: unknown keys are refused, and so is true, nan or 1e400 as a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes ``True`` for the number 1, and YAML reads ``on`` and ``yes`` as ``True``."""
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool | np.bool_) for item in values):
            kinds = _kinds_of(cls.model_fields[info.field_name or ""].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError("expected a number, which true and false are not")
        return value


def _kinds_of(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_kinds_of, get_args(annotation)))


class DataConfig(StrictModel):
    """Where the instances come from."""

    dataset: str
    subset: str | None = None
    revision: str | None = None
    columns: Pairs = ()
    splits: Pairs = ()
    unanswerable: bool = True
    overlap: Literal["error", "drop", "allow"] = "error"
    policy_rows: Literal["new", "all"] = "new"
    train_size: int | None = Field(default=None, ge=1)
    validation_size: int | None = Field(default=None, ge=1)
    test_size: int | None = Field(default=None, ge=1)

    def size(self, split: str) -> int | None:
        """How many instances of a split are used; ``None``: all."""
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
    """What an answer is worth."""

    kind: Literal["exact_match", "balanced", "likelihood", "metric", "agreement"] = "exact_match"
    metric: str = "exact_match"
    label_range: float = Field(default=1.0, gt=0)


class RewardConfig(StrictModel):
    """What a decision earns."""

    objective: ObjectiveKey = "lexicographic"
    epsilon: float = Field(default=0.01, ge=0)
    penalty: float = Field(default=20.0, gt=0)
    cost_scale: float = Field(default=1.0, gt=0)
    gains: Literal["counted", "ignored"] = "counted"
    vector: bool = False
    dense: bool = False


class EnvConfig(StrictModel):
    """All keys of an env's configuration. ``envs_configs/base.yaml`` explains each one."""

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

    if TYPE_CHECKING:  # pydantic makes it, since the model is frozen

        def __hash__(self) -> int: ...


PARTS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "backbone": BackboneConfig,
    "tokens": TokensConfig,
    "quality": QualityConfig,
    "reward": RewardConfig,
}
# Short names that are not the last word of the key's own. Two of them are names of parts as well: a mapping is the
# part, anything else the key.
_SHORT = {
    "backbone.name": "backbone",
    "tokens.shares": "token_shares",
    "tokens.ranking": "token_ranking",
    "quality.kind": "quality",
    "reward.vector": "vector_reward",
    "reward.dense": "dense_reward",
}
KEYS = tuple(  # all of them, dotted
    key
    for name in EnvConfig.model_fields
    for key in ([f"{name}.{inner}" for inner in PARTS[name].model_fields] if name in PARTS else [name])
)
_DOTTED = {_SHORT.get(key, key.rpartition(".")[2]): key for key in KEYS}  # by short name


def is_key(name: str) -> bool:
    """Whether a name is that of a key, in any spelling, or of a part."""
    return name in KEYS or name in _DOTTED or name in PARTS


def dotted(values: Mapping[str, Any], origin: str = "the config") -> dict[str, Any]:
    """Values by dotted key, however their keys are spelled; the values are not checked.

    Raises ``UnknownKeyError``, or ``ConfigError`` if a key has two values, or a part is no mapping.
    """
    found: dict[str, Any] = {}
    spelling: dict[str, str] = {}
    for key, name, value in _each(values, origin):
        if key in found and not _same(found[key], value):
            raise ConfigError(
                f"{origin}: config key {key!r} has two values: {spelling[key]!r} is {short(found[key])}, and {name!r} "
                f"is {short(value)}; leave one of them out"
            )
        found[key], spelling[key] = value, name
    return found


def stored_config(values: Mapping[str, Any], origin: str) -> EnvConfig:
    """The configuration that a file holds; what it lacks is the default.

    It was checked when it was written: what it names need not be registered or be there. Raises ``ConfigError``.
    """
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in dotted(values, origin).items()}
    needed = {name: {} for name, part in PARTS.items() if any(key.is_required() for key in part.model_fields.values())}
    try:
        return EnvConfig(**{**needed, **nested(plain)})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{origin}: config key {key!r}: {first['msg']}, got {short(first['input'])}") from error


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, in mappings of their parts, as they are written down."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        part, _, inner = key.rpartition(".")
        (found.setdefault(part, {}) if part else found)[inner] = value
    return found


def _each(values: Mapping[str, Any], origin: str) -> Iterator[tuple[str, str, Any]]:
    """Dotted key, spelling and value of each."""
    for name, value in values.items():
        if name in PARTS and isinstance(value, Mapping):
            for inner, of_part in value.items():
                key = f"{name}.{inner}"
                if key not in KEYS:
                    raise _unknown(key, name, origin)
                yield key, key, of_part
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
    # TorchRL tells an unknown keyword from other errors by Python's own words, which are therefore in it.
    return UnknownKeyError(
        f"{origin}: unknown config key {key!r}{hint} Known keys: {', '.join(KEYS)} (unexpected keyword argument "
        f"{keyword!r})."
    )


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except ValueError:  # arrays do not tell
        return False
