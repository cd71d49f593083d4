"""Runs side by side: one row per env and agent, over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t
from sd_gym.agents.runs.finished import Run, agent_label, finished_runs, group_by_settings, read_run

COLUMNS = ["env", "agent", "test rows", "dense quality", "against dense, points (worst, its 95% interval)"]
COLUMNS += [
    "goodput (95%)",
    "goodput at 0.25 / 0.5 / 0.75 / 1 epsilon lost (95%)",
    "FLOPs (worst)",
    "as learned: FLOPs (points)",
    "return",
    "regret",
    "score",
]
COLUMNS += ["FLOPs easy / hard", "time, batch 32 (dense by length)", "masks used", "quality kept"]


def compare(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Runs side by side, on the test split: ``sd-gym compare``.

    Args:
        folders: Of runs, and of what ``sd_gym.evaluate`` wrote.

    Returns:
        A dictionary per env and agent, over its runs. Runs are seeds of one agent if they differ in nothing but their
        seed; others have a dictionary of their own, whose ``agent`` says in brackets what differs. Its keys:

        - ``env``, ``agent``, ``seeds`` (how many), ``test_rows`` (how many, and their hash);
        - means: ``quality_ref``, ``quality_difference``, ``flops_ratio`` (the policy's own included), ``flops_easy``
          and ``flops_hard`` (of the easiest and the hardest level), ``return`` (the reward), ``regret`` and
          ``normalised_score`` (0 = hull, 1 = full information), on tables,
          ``time_ratio`` and the control ``dense_by_length`` (at batch 32); ``None`` where one is not known;
        - ``as_learned``: means of ``quality_difference``, ``flops_ratio``, ``return`` and ``regret`` at the end of
          learning, before selection; ``None`` where nothing was selected;
        - of serving envs, a value a run: ``goodput``, the share of requests that are answered in time, and
          ``goodput_at``, that at a quarter, half, three quarters and all of epsilon lost; else ``None``, and empty;
        - of the worst run: ``worst_difference``, its 95% ``worst_interval``, and ``worst_flops``;
        - ``decisions_used`` (fewest, most), and ``quality_kept`` (how many runs keep the quality).

    Raises:
        FileNotFoundError: If no folder holds a finished run.
        ValueError: If a file is damaged.

    Warns:
        UserWarning: If a folder holds no finished run (it is ignored), or a run is given twice (it counts once).
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for folder in finished_runs(folders):
        run = read_run(folder)
        groups.setdefault((run.config["env"], agent_label(run.config)), []).append(run)
    return [
        _row(env, name, [run.result for run in runs])
        for (env, agent), of_agent in sorted(groups.items())
        for name, runs in group_by_settings(agent, of_agent)
    ]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of ``COLUMNS`` for a row of ``compare``."""
    low, high = (100 * bound for bound in row["worst_interval"])
    fewest, most = row["decisions_used"]
    learned = row["as_learned"]
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
        "-" if row["return"] is None else f"{row['return']:+.3f}",
        "-" if row["regret"] is None else f"{row['regret']:.3f}",
        "-" if row["normalised_score"] is None else f"{row['normalised_score']:.2f}",
        "-" if row["goodput"] is not None else f"{row['flops_easy']:.0%} / {row['flops_hard']:.0%}",
        _time(row["time_ratio"], row["dense_by_length"]),
        f"{fewest} to {most}" if fewest != most else str(fewest),
        f"{row['quality_kept']} of {row['seeds']}",
    ]


def _over_seeds(values: list[float]) -> str:
    """A mean in per cent, with its 95% interval where there are several."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return f"{fmean(values):.2%}" + ("" if half is None else f" ± {100 * half:.2f}")


def _time(ratio: float | None, control: float | None) -> str:
    """Times over dense: the policy's and, as a control, that of dense passes cut by length."""
    return "-" if ratio is None else f"{ratio:.0%}" + (f" ({control:.0%})" if control is not None else "")


def _row(env: str, agent: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    worst = min(results, key=lambda result: result["quality_difference"])
    flops = [result["flops_ratio_with_policy"] for result in results]
    last = [result["last_policy"] for result in results if result.get("last_policy")]
    timed = [result["time"]["32"] for result in results if result["time"]]
    controls = [times["dense_by_length"] for times in timed if "dense_by_length" in times]
    decisions = [result["decisions_used"] for result in results]
    counted = all(result["policy_flops_counted"] for result in results)
    test_hash = worst.get("data", {}).get("test", {}).get("hash")
    return {
        "env": env,
        "agent": agent if counted else f"{agent} (its own FLOPs not counted)",
        "seeds": len(results),
        "test_rows": f"{worst['instances']}{f', hash {test_hash}' if test_hash else ''}",
        "quality_ref": fmean(result["quality_ref"] for result in results),
        "worst_difference": worst["quality_difference"],
        "worst_interval": tuple(worst["quality_difference_interval"]),
        **_means(results),
        "as_learned": _means(last) if last else None,
        "goodput": [result["goodput"] for result in results] if "goodput" in worst else None,
        "goodput_at": [[result["goodput_at"][part] for result in results] for part in worst.get("goodput_at", ())],
        "worst_flops": max(flops),
        "flops_easy": fmean(result["by_difficulty"][0]["flops_ratio"] for result in results),
        "flops_hard": fmean(result["by_difficulty"][-1]["flops_ratio"] for result in results),
        "time_ratio": fmean(times["time_ratio"] for times in timed) if timed else None,
        "dense_by_length": fmean(controls) if controls else None,
        "decisions_used": (min(decisions), max(decisions)),
        "quality_kept": sum(result["quality_kept"] for result in results),
    }


def _means(results: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means of what is known of all results; ``None`` where it is not."""
    keys = {
        "flops_ratio": "flops_ratio_with_policy",
        **{key: key for key in ("quality_difference", "return", "regret", "normalised_score")},
    }
    known = {name: [result[key] for result in results if result.get(key) is not None] for name, key in keys.items()}
    return {name: fmean(values) if values else None for name, values in known.items()}
