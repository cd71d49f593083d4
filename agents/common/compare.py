"""Runs side by side: one row an env and agent, over seeds."""

from __future__ import annotations

import json
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


def comparison(folders: list[Path]) -> list[list[str]]:
    """Rows of ``COLUMNS`` for finished runs, grouped by env, agent and what the agent started from.

    Raises:
        FileNotFoundError: If a folder holds no finished run.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for folder in folders:
        config, result = finished(folder)
        groups.setdefault((config["env"], agent_of(config)), []).append(result)
    return [_row(env, agent, results) for (env, agent), results in sorted(groups.items())]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``result.json`` of a finished run.

    Raises:
        FileNotFoundError: If the folder holds none.
    """
    if not (folder / "result.json").exists():
        raise FileNotFoundError(f"no result.json in {folder}; expected the folder of a finished run")
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


def _row(env: str, agent: str, results: list[dict[str, Any]]) -> list[str]:
    difference = [100 * result["quality_difference"] for result in results]
    worst = min(results, key=lambda result: result["quality_difference"])
    low, high = (100 * bound for bound in worst["quality_difference_interval"])
    flops = [result["flops_ratio_with_policy"] for result in results]
    easy = fmean(result["by_difficulty"][0]["flops_ratio"] for result in results)
    hard = fmean(result["by_difficulty"][-1]["flops_ratio"] for result in results)
    times = [result["time"]["32"]["time_ratio"] for result in results if result["time"]]
    decisions = sorted(result["decisions_used"] for result in results)
    return [
        env,
        agent,
        str(len(results)),
        f"{fmean(result['quality_ref'] for result in results):.1%}",
        f"{fmean(difference):+.2f} ({min(difference):+.2f}, {low:+.2f} to {high:+.2f})",
        f"{fmean(flops):.1%} ({max(flops):.1%})",
        f"{easy:.0%} / {hard:.0%}",
        f"{fmean(times):.0%}" if times else "-",
        f"{decisions[0]} to {decisions[-1]}" if decisions[0] != decisions[-1] else str(decisions[0]),
        f"{sum(result['quality_kept'] for result in results)} of {len(results)}",
    ]
