"""Finished runs, grouped by everything but their seed."""

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sd_gym.agents.runs.folder import STARTS, read_description, read_result

from sd_gym.config import EnvConfig, dotted, stored_config

FILES = ("config.json", "result.json")
# Keys of the env by which all runs are judged; of serving envs, these.
JUDGING = ("quality.", "reward.epsilon", "reward.penalty", "reward.cost_scale", "reward.gains", "backbone.max_")
OF_SERVING = ("epsilon", "arrivals", "load", "deadline", "requests")
INCIDENTAL = ("backbone.device", *STARTS)  # may differ between the seeds of one agent; see ``origins``


class Run(NamedTuple):
    """A finished run: its folder, ``config.json`` and ``result.json``."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def seed(self) -> int | None:
        """Its seed; ``None`` for results of ``sd_gym.evaluate``."""
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
        """By key, all that runs of one agent have in common."""
        data = {f"{split} data": provenance["hash"] for split, provenance in self.config["data"].items()}
        training = {key: self.config.get(key) for key in ("steps", "confidence", "weights")}
        env = self.config["env_config"] if self.is_serving else dotted(self.env.model_dump())
        values = {**training, **env, **self.config["agent_settings"], **data}
        if not self.config.get("named", True):  # without a name it is a run of no other agent
            values["folder"] = str(self.folder)
        values = {key: value for key, value in values.items() if key not in INCIDENTAL}
        return values | self.config.get("origins", {})


def agent_label(run: Run) -> str:
    """The agent's name, with that of the agent whose run it started from."""
    start = run.config.get("origins", {}).get("start")
    return run.config["algo"] if start is None else f"{run.config['algo']} from {start.partition(',')[0]}"


def grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    """Runs grouped by a key, in the order of the sorted keys."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return dict(sorted(groups.items()))


def group_by_agent(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of one env, by agent and settings: within a group only seeds differ, and its name tells it from others.

    If runs differ in how they are judged, as in epsilon, all names say so.
    """
    runs = list(runs)
    judged = {key for key in _differing(runs) if key in (*OF_SERVING, "weights") or key.startswith(JUDGING)}
    if len({run.config.get("confidence") for run in runs} - {None}) > 1:  # results of sd_gym.evaluate may have none
        judged.add("confidence")
    by_label = grouped(runs, agent_label)
    return [group for label, of_agent in by_label.items() for group in _by_settings(label, of_agent, judged)]


def _differing(runs: list[Run]) -> set[str]:
    """The keys in which runs differ, but for their seed."""
    identities = [run.identity for run in runs]
    keys = {key for identity in identities for key in identity}
    return {key for key in keys if len({json.dumps(identity.get(key)) for identity in identities}) > 1}


def _one_line(value: Any) -> str:
    """A setting in the name of an agent, which stands in tables; a prompt may have several lines."""
    return json.dumps(value, ensure_ascii=False)[1:-1] if isinstance(value, str) else str(value)


def _by_settings(agent: str, runs: list[Run], judged: set[str]) -> list[tuple[str, list[Run]]]:
    differ = sorted(_differing(runs) | judged)
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        notes = [f"{key} {_one_line(value)}" for key in differ if (value := run.identity.get(key)) is not None]
        shared = run.result["data"]["test"]["also_in"]
        notes += [f"{count} of its {run.result['instances']} test rows in {name}" for name, count in shared.items()]
        group = groups.setdefault(f"{agent} ({', '.join(notes)})" if notes else agent, {})
        key = str(run.folder) if run.seed is None else json.dumps([run.seed, run.config.get("origin_seeds")])
        if key in group:  # a result of sd_gym.evaluate has no history
            kept, left_out = sorted((group[key], run), key=lambda run: not run.result["history"])
            warnings.warn(f"counted once: {left_out.folder} is a copy of the run {kept.folder}", stacklevel=4)
            run = kept
        group[key] = run
    return [(name, list(group.values())) for name, group in sorted(groups.items())]


def finished_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs with a result on the test split; raises and warns as ``compare``."""
    different: dict[Path, Path] = {}
    given = [run for folder in folders for run in _runs_in(Path(folder))]
    again = [folder for folder in given if different.setdefault(folder.resolve(), folder) is not folder]
    if again:
        names = ", ".join(sorted({str(folder.resolve()) for folder in again}))
        warnings.warn(f"{len(again)} of the folders were given before; counted once: {names}", stacklevel=3)
    finished = [folder for folder in different.values() if _is_finished(folder)]
    runs = [Run(folder, read_description(folder), read_result(folder)) for folder in finished]
    tested = {run.folder: run for run in runs if run.result["split"] == "test"}
    others = ", ".join(str(folder) for folder in different.values() if folder not in tested)
    if not tested:
        raise FileNotFoundError(f"no result.json of a test split in {others or 'no folder'}; expected finished runs")
    if others:
        warnings.warn(f"ignored, as they hold no result.json of a test split: {others}", stacklevel=3)
    return list(tested.values())


def _runs_in(folder: Path) -> list[Path]:
    """The finished runs inside a folder, such as that of a comparison; the folder itself if it is one or has none."""
    inside = [] if _is_finished(folder) else sorted(file.parent for file in folder.rglob("result.json"))
    return [run for run in inside if _is_finished(run)] or [folder]


def _is_finished(folder: Path) -> bool:
    return all((folder / file).exists() for file in FILES)
