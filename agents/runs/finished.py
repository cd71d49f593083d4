"""Finished runs, grouped by all that is not their seed."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sd_gym.agents.runs.folder import read_description, read_result

from sd_gym.config import EnvConfig, dotted, stored_config

INCIDENTAL = ("backbone.device", "start", "path")  # settings that may differ from seed to seed, and in no result


class Run(NamedTuple):
    """A finished run: its folder, ``config.json`` and ``result.json``."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def seed(self) -> int | None:
        """Its seed; ``None`` of what ``sd_gym.evaluate`` wrote."""
        return self.config.get("seed")

    @property
    def is_serving(self) -> bool:
        """Whether it is a dial on a serving env."""
        return "arrivals" in self.config["env_config"]

    @property
    def env(self) -> EnvConfig:
        """The env's config."""
        return stored_config(self.config["env_config"], str(self.folder / "config.json"))

    @property
    def identity(self) -> dict[str, Any]:
        """What it has to share with others of its agent, by key."""
        data = {f"{split} data": provenance["hash"] for split, provenance in self.config.get("data", {}).items()}
        training = {key: self.config.get(key) for key in ("steps", "confidence", "weights")}
        env = self.config["env_config"] if self.is_serving else dotted(self.env.model_dump())
        values = {**training, **env, **self.config["agent_settings"], **data}
        if not self.config.get("named", True):  # nobody said that it is a run of the same agent as another one
            values["folder"] = str(self.folder)
        return {key: value for key, value in values.items() if key not in INCIDENTAL}


def read_run(folder: Path) -> Run:
    """A finished run. Raises: see ``read_description``."""
    return Run(folder, read_description(folder), read_result(folder))


def agent_label(config: dict[str, Any]) -> str:
    """The agent's name, with that of the run it started from."""
    start = config["agent_settings"].get("start")
    if start is None:
        return config["algo"]
    file = Path(start) / "config.json"
    name = read_description(file.parent)["algo"] if file.exists() else Path(start).name
    return f"{config['algo']} from {name}"


def group_by_settings(agent: str, runs: list[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of an agent that differ in nothing but their seed, each group under a name that says what sets it apart."""
    keys = {key for run in runs for key in run.identity}
    differ = sorted(key for key in keys if len({json.dumps(run.identity.get(key)) for run in runs}) > 1)
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        notes = [f"{key} {run.identity.get(key)}" for key in differ]
        shared = run.result.get("data", {}).get("test", {}).get("also_in", {})
        notes += [f"{count} of its {run.result['instances']} test rows in {name}" for name, count in shared.items()]
        group = groups.setdefault(f"{agent} ({', '.join(notes)})" if notes else agent, {})
        begun = [run.config["agent_settings"].get(key) for key in ("start", "path")]
        draw = str(run.folder) if run.seed is None else json.dumps([run.seed, *begun])
        if draw in group:
            warnings.warn(f"a copy, counted once: {run.folder} is of the same seed as another run", stacklevel=3)
        group[draw] = run
    return [(name, list(group.values())) for name, group in sorted(groups.items())]


def finished_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Those of the folders that hold a result on the test split; raises and warns as ``compare``."""
    given = [Path(folder) for folder in folders]
    times = Counter(folder.resolve() for folder in given)
    folders = list({folder.resolve(): folder for folder in reversed(given)}.values())[::-1]
    if twice := len(given) - len(folders):
        again = sorted(str(folder) for folder, count in times.items() if count > 1)
        warnings.warn(f"{twice} of the folders were given before; counted once: {', '.join(again)}", stacklevel=3)
    finished = [folder for folder in folders if _is_tested(folder)]
    left = ", ".join(str(folder) for folder in folders if folder not in finished)
    if not finished:
        raise FileNotFoundError(f"no result.json of a test split in {left or 'no folder'}; expected finished runs")
    if left:
        warnings.warn(f"passed over, as they hold no result.json of a test split: {left}", stacklevel=3)
    return finished


def _is_tested(folder: Path) -> bool:
    there = all((folder / f"{name}.json").exists() for name in ("config", "result"))
    return there and read_run(folder).result["split"] == "test"
