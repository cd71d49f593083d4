"""The configuration of a serving env: a YAML file per env in ``envs_configs/serving/``; each key can be overridden."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationInfo, field_validator

from sd_gym.config import SplitName, StrictModel, UnknownKeyError, validated
from sd_gym.envs.config import read_yaml, with_absolute_paths
from sd_gym.envs.serving.arrivals import Arrivals
from sd_gym.registration import CONFIG_FOLDER, SERVING


class Point(StrictModel):
    """An operating point of the server, and the time of a group of ``n`` requests, ``a*n + b`` seconds."""

    mask: tuple[int, ...] | None = None  # the decision of each switch, 1 = skip; then the token level
    margin: float | None = None  # of the policy's operating point, if there is a policy
    per_request: float = Field(gt=0, le=1e3)  # a
    per_group: float = Field(ge=0, le=1e3)  # b


class ServingConfig(StrictModel):
    """All keys of a serving env; ``envs_configs/serving/trec.yaml`` explains them."""

    id: str
    table: str
    policy: str | None = None
    points: tuple[Point, ...] = Field(min_length=2)
    split: SplitName = "train"
    arrivals: Arrivals = "bursts"
    load: float = Field(default=1.2, gt=0, le=100)
    requests: int = Field(default=10_000, ge=1, le=1_000_000)
    deadline: float = Field(default=1.0, gt=0, le=1e4)
    max_batch: int = Field(default=32, ge=1, le=4096)
    epsilon: float = Field(default=0.02, gt=0)
    penalty: float = Field(default=10.0, ge=0)

    if TYPE_CHECKING:  # pydantic makes it, since the model is frozen

        def __hash__(self) -> int: ...

    @field_validator("points")
    @classmethod
    def _check_points(cls, points: tuple[Point, ...], info: ValidationInfo) -> tuple[Point, ...]:
        has = "mask" if info.data.get("policy") is None else "margin"
        for point in points:
            if getattr(point, has) is None or None not in (point.mask, point.margin):
                raise ValueError(f"expected points with a {has} each: masks without 'policy', margins with it")
        if any(points[0].mask or ()):
            raise ValueError(f"expected dense, a mask of zeros, as the first point, got {list(points[0].mask or ())}")
        margins = [point.margin or 0.0 for point in points]
        if has == "margin" and not all(cautious > bold for cautious, bold in pairwise(margins)):
            raise ValueError(f"expected margins in descending order, from dense to bold, got {margins}")
        return points

    @property
    def capacity(self) -> float:
        """Requests per second of dense in full groups."""
        dense = self.points[0]
        return self.max_batch / (dense.per_request * self.max_batch + dense.per_group)


def make_serving_config(file: str | Path, overrides: Mapping[str, Any]) -> ServingConfig:
    """The configuration of a YAML file, in ``envs_configs/serving/`` or elsewhere, with overrides.

    Raises ``FileNotFoundError``, or ``ConfigError`` if a key or value is wrong.
    """
    bundled = CONFIG_FOLDER / "serving" / file
    source = bundled if bundled.is_file() else Path(file)
    values = with_absolute_paths(read_yaml(source), source, ("table", "policy"))
    origin = str(values.get("id", file))
    unknown = sorted(set(overrides) - set(ServingConfig.model_fields) | {"id"} & set(overrides))
    if unknown:
        known = ", ".join(key for key in ServingConfig.model_fields if key != "id")
        raise UnknownKeyError(f"{origin}: unknown key {unknown[0]!r}; expected one of {known}")
    return validated(ServingConfig, {**values, **overrides}, origin)


def serving_config(identity: str, overrides: Mapping[str, Any]) -> ServingConfig:
    """The configuration of a registered id; raises as ``make_serving_config``."""
    return make_serving_config(SERVING.find(identity), overrides)
