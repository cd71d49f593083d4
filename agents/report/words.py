"""What runs say, in words and in tables: the verdict first, with its power, and never more than is shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from sd_gym.agents.report.collect import WORST, AgentRuns, Task
from sd_gym.agents.runs.statistics import aggregate, probability_of_improvement


class Table(NamedTuple):
    """A table.

    Attributes:
        title: What it is.
        columns: Their names.
        rows: Their cells.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]


def verdict_words(task: Task) -> list[str]:
    """Sentences about a task: what can be told at all, who is best, and whether it beats what needs no learning."""
    fewest, losses, changes = task.power
    dense = task.first.result["quality_ref"]
    points = f"{100 * task.epsilon:g} point{'s' if 100 * task.epsilon != 1 else ''}"
    words = [f"The dense backbone's quality is {dense:.1%} on {task.instances:,} test instances; {points} may be lost."]
    if losses is None:
        needed = f"at least {fewest:,}" if task.epsilon else "that some quality may be lost"
        return [
            *words,
            f"These are too few instances to tell: a verdict takes {needed}. So of no agent is it said that "
            "it keeps the quality, whatever its figures are.",
        ]
    words.append(
        f"A verdict takes {fewest:,} instances. Here {_counted(losses, 'answer')} may be lost with none gained, or "
        f"{changes:,} changed with as many gained as lost, for the quality to be shown to be kept."
    )
    keeps = [one for one in task.learned if one.kept.all()]
    best = keeps[0] if keeps else next(iter(task.learned), None)
    if best is None:
        return [*words, "There are controls only; no agent has learned here."]
    mean, low, high = aggregate([best.flops])
    figures = (
        f"{mean:.1f}% of the FLOPs ({low:.1f} to {high:.1f})" if len(best.runs) > 1 else f"{mean:.1f}% of the FLOPs"
    )
    if keeps:
        words.append(f"{best.name} keeps the quality in {_all_of(best)} and runs {figures}: by its mean it saves most.")
    else:
        words.append(
            f"No agent keeps the quality in all its runs; {best.name}, which saves most where it does, keeps it in "
            f"{int(best.kept.sum())} of {len(best.runs)} and runs {figures}."
        )
    words += [_against(best, other) for other in task.learned if other is not best]
    return [*words, *_controls(task, best)]


def _all_of(agent: AgentRuns) -> str:
    return "its one run" if len(agent.runs) == 1 else f"all {len(agent.runs)} runs"


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("s" if n != 1 else "")


def _against(best: AgentRuns, other: AgentRuns) -> str:
    """How one stands against another, as far as their runs tell."""
    if min(len(best.runs), len(other.runs)) < 2:
        return f"Against {other.name} nothing can be told: it takes two runs each at least."
    return _told(best.name, other.name, probability_of_improvement([best.score], [other.score]))


def _told(one: str, other: str, improvement: tuple[float, float, float]) -> str:
    """Whether one is ahead of another, by the probability that a run of it is better, and its interval."""
    better, low, high = improvement
    told = "is ahead of" if low > 0.5 else "is behind" if high < 0.5 else "cannot be told apart from"
    return f"It {told} {other}: a run of {one} is better with a probability of {better:.0%} ({low:.0%} to {high:.0%})."


def _controls(task: Task, best: AgentRuns) -> list[str]:
    words = []
    if static := next((one for one in task.agents if one.algo == "static"), None):
        ahead = best.score.min() > static.score.max()
        told = _against(best, static)
        words.append(told if len(best.runs) > 1 < len(static.runs) else _one_static(best, static, ahead))
        if not ahead and (min(len(best.runs), len(static.runs)) < 2 or "ahead" not in told):
            words.append("So it is not shown to have learned anything about its inputs that one mask for all has not.")
    else:
        words.append(
            "There is no run of static masks here, so whether it has learned anything about its inputs is not known: "
            "sd-gym train ENV --algo static."
        )
    if oracle := next((one for one in task.agents if one.algo == "oracle"), None):
        words.append(
            f"The oracle, which looks at the answers, runs {oracle.flops.mean():.1f}%: a bound, and no target."
        )
    return words


def _one_static(best: AgentRuns, static: AgentRuns, ahead: bool) -> str:
    place = "Every run of it saves more than" if ahead else "Not every run of it saves more than"
    return f"{place} the best static mask, {static.flops.mean():.1f}% of the FLOPs; no interval, as there is one run."


def results_table(task: Task) -> Table:
    """A row an agent."""
    columns = [
        "agent",
        "runs",
        "quality against dense, points",
        "FLOPs, % of dense",
        "quality kept",
        "verdict",
        f"area ({WORST} epsilon = 0)",
        "time at batch 32",
    ]
    return Table(f"Results on {task.name}", columns, [_row(one) for one in task.agents])


def _row(agent: AgentRuns) -> list[str]:
    times = [run.result["time"]["32"]["time_ratio"] for run in agent.runs if run.result["time"]]
    verdicts = agent.verdicts
    shown = [f"{word} ({verdicts.count(word)})" if len(set(verdicts)) > 1 else word for word in dict.fromkeys(verdicts)]
    counted = all(run.result["policy_flops_counted"] for run in agent.runs)
    return [
        agent.name if counted else f"{agent.name} (its own FLOPs not counted)",
        str(len(agent.runs)),
        _figures(agent.difference, "+.2f"),
        _figures(agent.flops, ".1f"),
        f"{int(agent.kept.sum())} of {len(agent.runs)}",
        ", ".join(shown),
        _figures(agent.areas, ".3f"),
        f"{np.mean(times):.0%}" if times else "-",
    ]


def _figures(values: np.ndarray, form: str) -> str:
    mean, low, high = aggregate([values])
    return f"{mean:{form}}" + (f" ({low:{form}} to {high:{form}})" if len(values) > 1 else "")


def everywhere(tasks: Sequence[Task]) -> dict[str, list[AgentRuns]]:
    """The agents that have runs on every task, by name."""
    names = [{one.name for one in task.agents} for task in tasks]
    shared = sorted(set.intersection(*names)) if names else []
    return {name: [next(one for one in task.agents if one.name == name) for task in tasks] for name in shared}


def overall_tables(tasks: Sequence[Task]) -> list[Table]:
    """Over all tasks: who saves most with the quality kept, and how probably one is better than another."""
    found = everywhere(tasks)
    rows = []
    for name, agents in found.items():
        mean, low, high = aggregate([one.score for one in agents])
        runs, kept = sum(len(one.runs) for one in agents), sum(int(one.kept.sum()) for one in agents)
        rows.append((mean, [name, str(runs), f"{mean:z.1%} ({low:z.1%} to {high:z.1%})", f"{kept} of {runs}"]))
    ranked = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
    tables = [Table("FLOPs saved with the quality kept, over all envs", ["agent", "runs", "saved", "kept"], ranked)]
    pairs = []
    for one, other in combinations([cells[0] for cells in ranked], 2):
        better, low, high = probability_of_improvement(*([a.score for a in found[name]] for name in (one, other)))
        told = "yes" if low > 0.5 or high < 0.5 else "no"
        pairs.append([one, other, f"{better:.0%} ({low:.0%} to {high:.0%})", told])
    if pairs:
        columns = ["agent", "better than", "probability", "told apart"]
        tables.append(Table("Probability of improvement, a run against a run on the same env", columns, pairs))
    return tables


def overall_words(tasks: Sequence[Task]) -> list[str]:
    """Who is ahead over all envs, as far as the runs tell; nothing where no two agents have runs on several of them."""
    found = {name: agents for name, agents in everywhere(tasks).items() if not agents[0].is_control}
    if len(tasks) < 2 or not found:
        return []
    means = {name: aggregate([one.score for one in agents]) for name, agents in found.items()}
    first, *others = sorted(found, key=lambda name: -means[name][0])
    mean, low, high = means[first]
    words = [f"{first} saves most with the quality kept: {mean:.1%} of the FLOPs ({low:.1%} to {high:.1%})."]
    for other in others:
        scores = ([a.score for a in found[name]] for name in (first, other))
        words.append(_told(first, other, probability_of_improvement(*scores)))
    return words


def levels_table(task: Task) -> Table:
    """FLOPs of each agent against difficulty."""
    levels = task.agents[0].levels
    columns = ["agent", *(f"level {level['difficulty']} (n={level['instances']})" for level in levels)]
    rows = [[one.name, *(f"{level['flops_ratio']:.1%}" for level in one.levels)] for one in task.agents]
    return Table("FLOPs against difficulty", columns, rows)


def reproduction_table(task: Task) -> Table:
    """A row a run: its command, its seed and its folder."""
    rows = [
        [one.name, str(run.seed), str(run.config.get("steps", "-")), run.config.get("command", "-"), run.folder.name]
        for one in task.agents
        for run in one.runs
    ]
    return Table("Runs", ["agent", "seed", "steps", "command", "folder"], rows)


def versions_table(tasks: Sequence[Task]) -> Table:
    """Versions of libraries, and hashes of data and backbones, of all runs."""
    rows: dict[tuple[str, str], dict[str, None]] = {}
    for task in tasks:
        for run in (run for one in task.agents for run in one.runs):
            for name, version in run.config.get("versions", {}).items():
                rows.setdefault(("all", name), {})[version] = None
            for split, data in run.config["data"].items():
                rows.setdefault((task.name, f"{split} rows, hash"), {})[data["hash"]] = None
            rows.setdefault((task.name, "backbone, hash of its weights"), {})[str(run.config["weights"])] = None
    cells = [[where, what, ", ".join(found)] for (where, what), found in rows.items()]
    return Table("Versions, data and backbones", ["env", "what", "value"], cells)
