"""Runs side by side: one row per env and agent, over seeds."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from sd_gym.agents.runs.finished_runs import finished_runs, group_by_agent, grouped
from sd_gym.agents.runs.statistics import half_interval

COLUMNS = ["env", "agent", "test rows", "dense quality", "against dense, points (worst, its 95% interval)"]
COLUMNS += ["goodput (95%)", "goodput at 0.25 / 0.5 / 0.75 / 1 epsilon lost (95%)", "FLOPs (worst)"]
COLUMNS += ["as learned: FLOPs (points)", "return", "regret", "score"]
COLUMNS += ["FLOPs easy / hard", "time, batch 32 (dense, sorted)", "masks used", "quality kept"]


def compare(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Runs side by side, on the test split: ``sd-gym compare``.

    Args:
        folders: Run folders, folders of runs, and folders that ``sd_gym.evaluate`` wrote.

    Returns:
        A dictionary per env and agent, over its runs. Runs of one agent differ only in their seed; others have a
        dictionary of their own, with the difference in brackets in ``agent``. Its keys:

        - ``env``, ``agent``, ``seeds`` (how many), ``test_rows`` (how many, and their hash);
        - means, or ``None`` if unknown: ``quality_ref``, ``quality_difference``, ``flops_ratio`` (the policy's own
          included), ``flops_easy`` and ``flops_hard`` (of the easiest and the hardest level), ``return`` (the reward),
          on tables ``regret`` and ``normalised_score`` (0 = hull, 1 = full information), ``time_ratio`` and the control
          ``dense_by_length`` (at batch 32);
        - ``as_learned``: means of ``quality_difference``, ``flops_ratio``, ``return`` and ``regret`` at the end of
          learning, before selection; ``None`` if nothing was selected;
        - for serving envs, one value per run: ``goodput``, the share of requests that are answered in time, and
          ``goodput_at``, the same at a quarter, half, three quarters and all of epsilon lost; else ``None`` and empty;
        - of the worst run: ``worst_difference``, its 95% ``worst_interval``, and ``worst_flops``;
        - ``decisions_used`` (fewest, most), and ``quality_kept`` (how many runs keep the quality).

    Raises:
        FileNotFoundError: If no folder holds a finished run.
        ValueError: If a file is damaged.

    Warns:
        UserWarning: If a folder holds no finished run (it is ignored), or a run is given twice (it counts once).
    """
    by_env = grouped(finished_runs(folders), lambda run: run.config["env"])
    return [
        _row(env, name, [run.result for run in runs])
        for env, of_env in by_env.items()
        for name, runs in group_by_agent(of_env)
    ]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table; what would end a cell or begin HTML is escaped."""
    lines = [
        [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in line]
        for line in [columns, ["---"] * len(columns), *rows]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of ``COLUMNS`` for a row of ``compare``."""
    low, high = (100 * bound for bound in row["worst_interval"])
    fewest, most = row["decisions_used"]
    learned, by_length = row["as_learned"], row["dense_by_length"]
    return [
        row["env"],
        row["agent"],
        row["test_rows"],
        f"{row['quality_ref']:.1%}",
        f"{100 * row['quality_difference']:+.2f} ({100 * row['worst_difference']:+.2f}, {low:+.2f} to {high:+.2f})",
        "-" if row["goodput"] is None else _over_seeds(row["goodput"]),
        "-" if row["goodput"] is None else " / ".join(map(_over_seeds, row["goodput_at"])),
        f"{row['flops_ratio']:.1%} ({row['worst_flops']:.1%})",
        "-" if learned is None else f"{learned['flops_ratio']:.1%} ({100 * learned['quality_difference']:+.2f})",
        _known(row["return"], "+.3f"),
        _known(row["regret"], ".3f"),
        _known(row["normalised_score"], ".2f"),
        "-" if row["goodput"] is not None else f"{row['flops_easy']:.0%} / {row['flops_hard']:.0%}",
        _known(row["time_ratio"], ".0%") + ("" if by_length is None else f" ({by_length:.0%})"),
        f"{fewest} to {most}" if fewest != most else str(fewest),
        f"{row['quality_kept']} of {row['seeds']}",
    ]


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _over_seeds(values: list[float]) -> str:
    """A mean in per cent, with its 95% interval where there are several."""
    return f"{fmean(values):.2%}" + (f" ± {100 * half_interval(values):.2f}" if len(values) > 1 else "")


def _row(env: str, agent: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    worst = min(results, key=lambda result: result["quality_difference"])
    last = [result["last_policy"] for result in results if result["last_policy"]]
    times = [result["time"]["32"] for result in results if result["time"]]
    decisions = [result["decisions_used"] for result in results]
    counted = all(result["policy_flops_counted"] for result in results)
    return {
        "env": env,
        "agent": agent if counted else f"{agent} (its own FLOPs not counted)",
        "seeds": len(results),
        "test_rows": f"{worst['instances']}, hash {worst['data']['test']['hash']}",
        "quality_ref": fmean(result["quality_ref"] for result in results),
        "worst_difference": worst["quality_difference"],
        "worst_interval": tuple(worst["quality_difference_interval"]),
        **_means(results),
        "as_learned": _means(last) if last else None,
        "goodput": [result["goodput"] for result in results] if "goodput" in worst else None,
        "goodput_at": [[result["goodput_at"][part] for result in results] for part in worst.get("goodput_at", ())],
        "worst_flops": max(result["flops_ratio_with_policy"] for result in results),
        "flops_easy": fmean(result["by_difficulty"][0]["flops_ratio_with_policy"] for result in results),
        "flops_hard": fmean(result["by_difficulty"][-1]["flops_ratio_with_policy"] for result in results),
        "time_ratio": _mean(times, "time_ratio"),
        "dense_by_length": _mean(times, "dense_by_length"),
        "decisions_used": (min(decisions), max(decisions)),
        "quality_kept": sum(result["quality_kept"] for result in results),
    }


def _means(results: list[dict[str, Any]]) -> dict[str, float | None]:
    keys = ("quality_difference", "return", "regret", "normalised_score")
    return {"flops_ratio": _mean(results, "flops_ratio_with_policy"), **{key: _mean(results, key) for key in keys}}


def _mean(results: list[dict[str, Any]], key: str) -> float | None:
    values = [result[key] for result in results if result.get(key) is not None]
    return fmean(values) if values else None
