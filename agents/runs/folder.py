"""The description and the result in a run's folder, checked when they are read."""

from __future__ import annotations

import csv
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from sd_gym.config import SPLITS
from sd_gym.errors import first_problem, one_line
from sd_gym.files import hash_of, read_json
from sd_gym.folders import MARKER
from sd_gym.version import __version__

BLIND = "blind-"  # prefix of the name of an agent that observes zeros
LIBRARIES = ("gymnasium", "numpy", "sd-gym", "stable-baselines3", "torch", "transformers")
STARTS = ("start", "path")  # settings that name the run that another one starts from
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Data(BaseModel):
    hash: str


class _Provenance(_Data):
    also_in: dict[str, int]


class _AgentSettings(BaseModel):
    """The settings that name another run; each agent checks its own."""

    start: str | None = None
    path: str | None = None


class _Description(BaseModel):
    """``config.json``; ``sd_gym.evaluate`` writes no seed, steps or confidence, and ``named`` if it got a name."""

    env: str
    algo: str
    named: bool = True
    env_config: dict[str, Any]
    agent_settings: _AgentSettings
    control: bool
    seed: int | None = None
    steps: int | None = None
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    data: dict[str, _Data]
    weights: str
    versions: dict[str, str] = {}
    origins: dict[str, str] = {}


class _Level(BaseModel):
    difficulty: int
    instances: int
    flops_ratio_with_policy: Finite
    skip_rate: list[Finite] = []


class _Validation(BaseModel):
    step: int
    quality: Finite
    quality_ref: Finite
    flops_ratio_with_policy: Finite


class _Timed(BaseModel):
    time_ratio: Finite
    dense_by_length: Finite | None = None


class _Means(BaseModel):
    """The compared means of a policy, as selected or as learned."""

    quality_difference: Finite
    flops_ratio_with_policy: Finite
    mean_reward: Finite | None = Field(default=None, alias="return")
    regret: Finite | None = None
    normalised_score: Finite | None = None


class _Result(_Means):
    """The compared keys of ``result.json``."""

    split: str
    instances: int
    quality_ref: Finite
    quality_difference_interval: tuple[float, float]
    epsilon: Finite
    highest_quality: Finite = 1.0
    verdict: str
    guarantee: str | None
    last_policy: _Means | None
    by_difficulty: list[_Level] = Field(min_length=1)
    time: dict[str, _Timed]
    decisions_used: int
    quality_kept: bool
    policy_flops_counted: bool
    decisions_hash: str
    skip_rate: dict[str, float]
    goodput: Finite | None = None
    goodput_at: dict[str, Finite] = {}
    history: list[_Validation]
    data: dict[str, _Provenance]

    @model_validator(mode="after")
    def _has_compared_values(self) -> _Result:
        if self.time and "32" not in self.time:
            raise ValueError(f"expected a time at batch size 32, got {', '.join(self.time)}")
        if self.split not in self.data:
            raise ValueError(f"expected the rows of the split {self.split} in data, got {', '.join(self.data)}")
        return self


def run_description(
    names: dict[str, Any], config: BaseModel, backbone: Any, data: Any, splits: Sequence[str] = SPLITS
) -> dict[str, Any]:
    """``config.json``: what names the run, the env's config, and the current command, versions, backbone and data.

    ``data``: the core's. An error in one of the ``splits`` is raised.
    """
    return {
        MARKER: __version__,
        **names,
        "command": shlex.join(sys.argv),
        "env_config": config.model_dump(),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "weights": backbone.weights,
        "data": {name: data[name].identity for name in splits},
    }


def origins(settings: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Two dictionaries about the runs that an agent's ``settings`` name, by setting: what was run, and its seed.

    What was run: the agent, and a hash of everything but seed and folder. If a folder is not a run: its name and path
    instead.
    """
    found, seeds = dict[str, str](), dict[str, Any]()
    for key in STARTS:
        if settings.get(key) is None:
            continue
        folder = Path(settings[key])
        found[key], seeds[key] = folder.name, str(folder)
        if (folder / "config.json").is_file():
            run = read_description(folder)
            what = {name: run.get(name) for name in ("env", "steps", "confidence", "weights", "env_config", "origins")}
            settings_of_run = run["agent_settings"].items()
            what["agent_settings"] = {name: value for name, value in settings_of_run if name not in STARTS}
            found[key], seeds[key] = f"{run['algo']}, {hash_of(what)[:8]}", [run.get("seed"), run.get("origin_seeds")]
    return found, seeds


def read_description(folder: Path) -> dict[str, Any]:
    """A run's ``config.json``.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or not of a run.
    """
    return _read(folder, "config.json", _Description)


def read_result(folder: Path) -> dict[str, Any]:
    """A run's ``result.json``. Raises: see ``read_description``."""
    return _read(folder, "result.json", _Result)


@contextmanager
def instance_rows(file: Path) -> Iterator[list[dict[str, str]]]:
    """The lines of an ``instances.csv`` by column; errors in them become a ``ValueError`` that names the file."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:  # spreadsheets write a byte order mark
            yield list(csv.DictReader(lines))
    except (KeyError, TypeError, ValueError, IndexError, csv.Error) as error:
        expected = "expected a line per instance with id, decision and scores"
        raise ValueError(f"{file} is damaged: {expected} ({one_line(error)}); copy it again") from error


def _read(folder: Path, name: str, schema: type[BaseModel]) -> dict[str, Any]:
    file = folder / name
    if not file.exists():
        raise FileNotFoundError(f"no {name} in {folder}; expected a folder that 'sd-gym train' wrote")
    values = read_json(file)
    try:
        schema.model_validate(values)
    except ValidationError as error:
        key, problem = first_problem(error)
        expected = "expected a folder that 'sd-gym train' wrote"
        raise ValueError(f"{file} does not describe a run; {expected}: {key}: {problem}") from error
    return values


def check_backbone(run: Path, expected: str, backbone: Any) -> None:
    """Raise ``ValueError`` if the hash of a backbone's weights is not the ``expected`` one, from ``config.json``."""
    if expected != backbone.weights:
        raise ValueError(
            f"{run}: the backbone {backbone.name!r} has other weights than in training (hash {expected[:12]}, now "
            f"{backbone.weights[:12]}); restore the old ones, or train again"
        )
