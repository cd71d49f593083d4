"""Runs side by side: one row an env and agent, over seeds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from sd_gym.agents.experiment.folder import read_description, read_result

from sd_gym.config import spelled
from sd_gym.envs.config import EnvConfig, stored_config

INCIDENTAL = ("backbone.device", "start", "path")  # settings that may differ from seed to seed, and in no result
COLUMNS = [
    "env",
    "agent",
    "seeds",
    "test rows",
    "dense quality",
    "against dense, points (worst, its 95% interval)",
    "FLOPs (worst)",
    "FLOPs easy / hard",
    "time, batch 32 (dense by length)",
    "decisions",
    "quality kept",
]


class Run(NamedTuple):
    """A finished run.

    Attributes:
        folder: Where it is.
        config: Its ``config.json``.
        result: Its ``result.json``.
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def seed(self) -> int | None:
        """Its seed; ``None`` of what ``sd_gym.evaluate`` wrote."""
        return self.config.get("seed")

    @property
    def env(self) -> EnvConfig:
        """The env's config."""
        return stored_config(self.config["env_config"], str(self.folder / "config.json"))

    @property
    def identity(self) -> dict[str, Any]:
        """What it has to share with others of its agent, by key."""
        known = spelled(self.env.model_dump())
        data = {f"{split} data": one["hash"] for split, one in self.config["data"].items()}
        how = {key: self.config.get(key) for key in ("steps", "strictness", "weights")}
        named = {**how, **known, **self.config["agent_settings"], **data}
        return {key: value for key, value in named.items() if key not in INCIDENTAL}


def compare(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Runs side by side, on the test split: ``sd-gym compare``.

    Args:
        folders: Of runs, and of what ``sd_gym.evaluate`` wrote.

    Returns:
        A dictionary for each env and agent (and what the agent started from), over its runs. Only runs that differ in
        nothing but their seed are seeds of one agent: same config, data, backbone, epsilon, settings and steps; others
        have a dictionary of their own, and ``agent`` says in brackets what differs. It has ``env``, ``agent``,
        ``seeds`` (how many), ``test_rows`` (how many, and their hash), ``quality_ref``; means ``quality_difference``,
        ``flops_ratio`` (the policy's own included), ``flops_easy``, ``flops_hard`` (of the easiest and the hardest
        level), ``time_ratio`` and the control ``dense_by_length`` (at batch 32; ``None`` where nothing was timed); the
        worst run's ``worst_difference``, its 95% ``worst_interval`` and ``worst_flops``; ``decisions_used`` (fewest,
        most), and ``quality_kept`` (how many runs keep the quality).

    Raises:
        FileNotFoundError: If no folder holds a finished run.
        ValueError: If what one holds is damaged.

    Warns:
        UserWarning: If folders hold none; they are passed over. If a run is given twice, by whatever path; it counts
            once, as do runs of one agent with the same seed.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for folder in finished_runs(folders):
        run = read_run(folder)
        groups.setdefault((run.config["env"], agent_of(run.config)), []).append(run)
    return [
        _row(env, name, [run.result for run in runs])
        for (env, agent), of_agent in sorted(groups.items())
        for name, runs in alike(agent, of_agent)
    ]


def alike(agent: str, runs: list[Run]) -> list[tuple[str, list[Run]]]:
    """Those runs of an agent that differ in nothing but their seed, each under a name that says what sets it apart."""
    keys = {key for run in runs for key in run.identity}
    differ = sorted(key for key in keys if len({json.dumps(run.identity.get(key)) for run in runs}) > 1)
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        notes = [f"{key} {run.identity.get(key)}" for key in differ]
        shared = run.result.get("data", {}).get("test", {}).get("also_in", {})
        notes += [f"{count} of its {run.result['instances']} test rows in {name}" for name, count in shared.items()]
        found = groups.setdefault(f"{agent} ({', '.join(notes)})" if notes else agent, {})
        begun = [run.config["agent_settings"].get(key) for key in ("start", "path")]
        draw = str(run.folder) if run.seed is None else json.dumps([run.seed, *begun])
        if draw in found:
            warnings.warn(f"a copy, counted once: {run.folder} is of the same seed as another run", stacklevel=3)
        found[draw] = run
    return [(name, list(found.values())) for name, found in sorted(groups.items())]


def finished_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Those of the folders that hold a result on the test split; raises and warns as ``compare``."""
    given = [Path(folder) for folder in folders]
    folders = list({folder.resolve(): folder for folder in reversed(given)}.values())[::-1]
    if twice := len(given) - len(folders):
        once = sorted({str(folder.resolve()) for folder in given if _times(folder, given) > 1})
        warnings.warn(f"{twice} of the folders were given before; counted once: {', '.join(once)}", stacklevel=3)
    found = [folder for folder in folders if _tested(folder)]
    left = ", ".join(str(folder) for folder in folders if folder not in found)
    if not found:
        raise FileNotFoundError(f"no result.json of a test split in {left or 'no folder'}; expected finished runs")
    if left:
        warnings.warn(f"passed over, as they hold no result.json of a test split: {left}", stacklevel=3)
    return found


def _times(folder: Path, given: list[Path]) -> int:
    return sum(one.resolve() == folder.resolve() for one in given)


def _tested(folder: Path) -> bool:
    there = all((folder / f"{name}.json").exists() for name in ("config", "result"))
    return there and read_run(folder).result["split"] == "test"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def read_run(folder: Path) -> Run:
    """A finished run; raises as ``read_description``."""
    return Run(folder, read_description(folder), read_result(folder))


def agent_of(config: dict[str, Any]) -> str:
    """The agent's name, with that of the run it started from."""
    start = config["agent_settings"].get("start")
    if start is None:
        return config["algo"]
    file = Path(start) / "config.json"
    name = read_description(file.parent)["algo"] if file.exists() else Path(start).name
    return f"{config['algo']} from {name}"


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of ``COLUMNS`` for a row of ``compare``."""
    low, high = (100 * bound for bound in row["worst_interval"])
    fewest, most = row["decisions_used"]
    return [
        row["env"],
        row["agent"],
        str(row["seeds"]),
        row["test_rows"],
        f"{row['quality_ref']:.1%}",
        f"{100 * row['quality_difference']:+.2f} ({100 * row['worst_difference']:+.2f}, {low:+.2f} to {high:+.2f})",
        f"{row['flops_ratio']:.1%} ({row['worst_flops']:.1%})",
        f"{row['flops_easy']:.0%} / {row['flops_hard']:.0%}",
        _time(row["time_ratio"], row["dense_by_length"]),
        f"{fewest} to {most}" if fewest != most else str(fewest),
        f"{row['quality_kept']} of {row['seeds']}",
    ]


def _time(ratio: float | None, control: float | None) -> str:
    """Times over dense: the policy's and, as a control, that of dense passes cut by length (older runs have none)."""
    return "-" if ratio is None else f"{ratio:.0%}" + (f" ({control:.0%})" if control is not None else "")


def _test_hash(result: dict[str, Any]) -> str | None:
    """Of the test split; ``None``: the result is of another one."""
    return result.get("data", {}).get("test", {}).get("hash")


def _row(env: str, agent: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    worst = min(results, key=lambda result: result["quality_difference"])
    flops = [result["flops_ratio_with_policy"] for result in results]
    timed = [result["time"]["32"] for result in results if result["time"]]
    controls = [one["dense_by_length"] for one in timed if "dense_by_length" in one]
    decisions = [result["decisions_used"] for result in results]
    counted = all(result["policy_flops_counted"] for result in results)
    return {
        "env": env,
        "agent": agent if counted else f"{agent} (its own FLOPs not counted)",
        "seeds": len(results),
        "test_rows": f"{worst['instances']}{f', hash {data}' if (data := _test_hash(worst)) else ''}",
        "quality_ref": fmean(result["quality_ref"] for result in results),
        "quality_difference": fmean(result["quality_difference"] for result in results),
        "worst_difference": worst["quality_difference"],
        "worst_interval": tuple(worst["quality_difference_interval"]),
        "flops_ratio": fmean(flops),
        "worst_flops": max(flops),
        "flops_easy": fmean(result["by_difficulty"][0]["flops_ratio"] for result in results),
        "flops_hard": fmean(result["by_difficulty"][-1]["flops_ratio"] for result in results),
        "time_ratio": fmean(one["time_ratio"] for one in timed) if timed else None,
        "dense_by_length": fmean(controls) if controls else None,
        "decisions_used": (min(decisions), max(decisions)),
        "quality_kept": sum(result["quality_kept"] for result in results),
    }
