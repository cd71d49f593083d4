"""Runs side by side: one row an env and agent, over seeds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

COLUMNS = [
    "env",
    "agent",
    "seeds",
    "dense quality",
    "against dense, points (worst, its 95% interval)",
    "FLOPs (worst)",
    "FLOPs easy / hard",
    "time, batch 32",
    "decisions",
    "quality kept",
]


def compare(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Runs side by side, on the test split: ``sd-gym compare``.

    Args:
        folders: Of runs, and of what ``sd_gym.evaluate`` wrote.

    Returns:
        A dictionary for each env and agent (and what the agent started from), over its runs: ``env``, ``agent``,
        ``seeds`` (how many), ``quality_ref``; means ``quality_difference``, ``flops_ratio`` (the policy's own
        included), ``flops_easy``, ``flops_hard`` (of the easiest and the hardest level), ``time_ratio`` (at batch 32;
        ``None`` where nothing was timed); the worst run's ``worst_difference``, its 95% ``worst_interval`` and
        ``worst_flops``; ``decisions_used`` (fewest, most), and ``quality_kept`` (how many runs keep the quality).

    Raises:
        FileNotFoundError: If no folder holds a finished run.

    Warns:
        UserWarning: If folders hold none; they are passed over.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for folder in finished_runs(folders):
        config, result = finished(folder)
        groups.setdefault((config["env"], agent_of(config)), []).append(result)
    return [_row(env, agent, results) for (env, agent), results in sorted(groups.items())]


def finished_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Those of the folders that hold a result on the test split; raises and warns as ``compare``."""
    folders = [Path(folder) for folder in folders]
    found = [folder for folder in folders if _tested(folder)]
    left = ", ".join(str(folder) for folder in folders if folder not in found)
    if not found:
        raise FileNotFoundError(f"no result.json of a test split in {left or 'no folder'}; expected finished runs")
    if left:
        warnings.warn(f"passed over, as they hold no result.json of a test split: {left}", stacklevel=3)
    return found


def _tested(folder: Path) -> bool:
    there = all((folder / f"{name}.json").exists() for name in ("config", "result"))
    return there and finished(folder)[1]["split"] == "test"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``result.json`` of a finished run."""
    config, result = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "result")
    )
    return config, result


def agent_of(config: dict[str, Any]) -> str:
    """The agent's name, with that of the run it started from."""
    start = config["agent_settings"].get("start")
    if start is None:
        return config["algo"]
    file = Path(start) / "config.json"
    name = json.loads(file.read_text(encoding="utf-8"))["algo"] if file.exists() else Path(start).name
    return f"{config['algo']} from {name}"


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of ``COLUMNS`` for a row of ``compare``."""
    low, high = (100 * bound for bound in row["worst_interval"])
    fewest, most = row["decisions_used"]
    return [
        row["env"],
        row["agent"],
        str(row["seeds"]),
        f"{row['quality_ref']:.1%}",
        f"{100 * row['quality_difference']:+.2f} ({100 * row['worst_difference']:+.2f}, {low:+.2f} to {high:+.2f})",
        f"{row['flops_ratio']:.1%} ({row['worst_flops']:.1%})",
        f"{row['flops_easy']:.0%} / {row['flops_hard']:.0%}",
        "-" if row["time_ratio"] is None else f"{row['time_ratio']:.0%}",
        f"{fewest} to {most}" if fewest != most else str(fewest),
        f"{row['quality_kept']} of {row['seeds']}",
    ]


def _row(env: str, agent: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    worst = min(results, key=lambda result: result["quality_difference"])
    flops = [result["flops_ratio_with_policy"] for result in results]
    times = [result["time"]["32"]["time_ratio"] for result in results if result["time"]]
    decisions = [result["decisions_used"] for result in results]
    counted = all(result.get("policy_flops_counted", True) for result in results)
    return {
        "env": env,
        "agent": agent if counted else f"{agent} (its own FLOPs not counted)",
        "seeds": len(results),
        "quality_ref": fmean(result["quality_ref"] for result in results),
        "quality_difference": fmean(result["quality_difference"] for result in results),
        "worst_difference": worst["quality_difference"],
        "worst_interval": tuple(worst["quality_difference_interval"]),
        "flops_ratio": fmean(flops),
        "worst_flops": max(flops),
        "flops_easy": fmean(result["by_difficulty"][0]["flops_ratio"] for result in results),
        "flops_hard": fmean(result["by_difficulty"][-1]["flops_ratio"] for result in results),
        "time_ratio": fmean(times) if times else None,
        "decisions_used": (min(decisions), max(decisions)),
        "quality_kept": sum(result["quality_kept"] for result in results),
    }
