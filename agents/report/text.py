"""The findings of runs in sentences and tables: the verdict with its power first, and nothing beyond the evidence."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.report.collect import WORST, AgentRuns, EnvRuns
from sd_gym.agents.runs.guarantee import in_points
from sd_gym.agents.runs.statistics import FEWEST_RUNS, Scores, aggregate, enough_runs, probability_of_improvement
from sd_gym.agents.runs.verdict import changes_allowed, fewest_instances, losses_allowed

# Keys of a result, with the factor and the format to show them.
FIGURES = (
    ("quality_difference", 100, "+.2f"),
    ("flops_ratio_with_policy", 100, ".1f"),
    ("return", 1, "+.3f"),
    ("regret", 1, ".3f"),
)
SAVED = "z.1%"  # format of savings


class Table(NamedTuple):
    """A table: its title, the names of its columns, and the cells of its rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def verdict_sentences(env: EnvRuns) -> list[str]:
    """Sentences about an env: its controls, the power of the tests, and the best agent, compared with the others."""
    n = env.first.result["instances"]
    epsilon = env.epsilon
    dense = env.first.result["quality_ref"]
    highest = env.first.result.get("highest_quality", 1.0)
    fewest, losses = fewest_instances(epsilon, highest), losses_allowed(n, epsilon, highest=highest)
    sentences = [
        _controls(env),
        f"The dense backbone's quality is {dense:.1%} on {n:,} test instances; {in_points(epsilon)} may be lost.",
    ]
    if losses is None:
        needed = f"at least {fewest:,}" if epsilon else "an epsilon above 0"
        return [
            *sentences,
            f"These are too few instances to tell: a verdict needs {needed}. So no agent can be shown to keep the "
            "quality.",
        ]
    answers = f"{losses:,} answer{'s' if losses != 1 else ''}"
    sentences.append(
        f"A verdict needs at least {fewest:,} instances. Here {answers} may be lost with none gained, or "
        f"{changes_allowed(n, epsilon, highest=highest):,} changed with as many gained as lost, and the quality is "
        "still shown to be kept."
    )
    if (best := env.best) is None:
        return [*sentences, "There are only controls; no agent has learned here."]
    n, (mean, low, high) = len(best.runs), aggregate([best.flops])
    figures = f"{mean:.1f}% of the FLOPs" + (f" ({low:.1f} to {high:.1f})" if n > 1 else "")
    if best.kept.all():
        runs = "its one run" if n == 1 else f"all {n} runs"
        sentences.append(
            f"{best.name} keeps the quality in {runs} and runs {figures}. Of the agents that keep it in all runs, it "
            "saves most by its mean."
        )
    else:
        sentences.append(
            f"No agent keeps the quality in all its runs; {best.name}, which has the best score, keeps it in "
            f"{int(best.kept.sum())} of {n} and runs {figures}."
        )
    if guarantee := best.median_run.result["guarantee"]:
        sentences.append(f"Its median run: {guarantee}.")
    sentences += [_against([best], [other]) for other in env.learned if other is not best]
    return [*sentences, *_against_controls(env, best)]


def _controls(env: EnvRuns) -> str:
    reached = [
        f"{agent.name} {agent.mean_flops:.1f}% (kept in {int(agent.kept.sum())} of {len(agent.runs)} runs)"
        for agent in env.agents
        if agent.is_control
    ]
    return f"FLOPs of the controls: {', '.join(reached)}." if reached else "There are no controls here."


def _against(agents: list[AgentRuns], others: list[AgentRuns]) -> str:
    """A sentence about the probability that a run of one agent is better; both arguments have an item per env."""
    first, second = agents[0].name, others[0].name
    scores = _scores(agents), _scores(others)
    if not enough_runs(*scores):
        return f"The runs are too few to compare it with {second}: that takes {FEWEST_RUNS} runs each."
    better, low, high = probability_of_improvement(*scores)
    place = "is ahead of" if low > 0.5 else "is behind" if high < 0.5 else "cannot be told apart from"
    return f"It {place} {second}: a run of {first} is better with a probability of {_interval(better, low, high)}."


def _scores(agents: list[AgentRuns]) -> list[NDArray]:
    return [agent.score for agent in agents]


def _interval(mean: float, low: float, high: float, form: str = ".0%") -> str:
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _against_controls(env: EnvRuns, best: AgentRuns) -> list[str]:
    sentences, by_algo = [], {agent.runs[0].config["algo"]: agent for agent in reversed(env.agents)}
    if hull := by_algo.get("hull"):
        every = best.score.min() > hull.score.max()
        if not hull.kept.all():
            every = True
            sentences.append(
                "The best mixture of masks (hull) is not shown to keep the quality, so there is none to compare with."
            )
        elif enough_runs([best.score], [hull.score]):
            sentences.append(_against([best], [hull]))
        else:
            sentences.append(
                f"{'Every' if every else 'Not every'} run of it saves more than the best mixture of masks (hull), "
                f"{hull.mean_flops:.1f}% of the FLOPs; no interval, as it takes {FEWEST_RUNS} runs each."
            )
        if not every and "is ahead of" not in sentences[-1]:
            sentences.append("So it is not shown to have learned anything about its inputs: static masks save as much.")
    else:
        sentences.append(
            "There is no run of hull here, so whether it has learned anything about its inputs is not known: "
            "sd-gym train ENV --algo hull."
        )
    if oracle := by_algo.get("oracle"):
        sentences.append(f"The oracle, which knows the answers, runs {oracle.mean_flops:.1f}%: a bound, no target.")
    return sentences


def results_table(env: EnvRuns) -> Table:
    """A row per agent."""
    figures = ("quality against dense, points", "FLOPs, % of dense", "return", "regret")
    columns = ["agent", "runs", "quality kept", "verdict"]
    columns += [f"{figure}{end}" for figure in figures for end in (", as selected", ", as learned")]
    columns += [f"area ({WORST} epsilon = 0)", "time at batch 32"]
    rows = [_row(agent) for agent in env.agents]
    known = [any(row[number] != "-" for row in rows) for number in range(len(columns))]
    columns, *rows = ([cell for cell, shown in zip(line, known, strict=True) if shown] for line in [columns, *rows])
    return Table(f"Results on {env.name}", columns, rows)


def _row(agent: AgentRuns) -> list[str]:
    figures = [
        _mean([scale * values], form) if len(values) else "-"
        for key, scale, form in FIGURES
        for values in (agent.values(key), agent.values(key, as_learned=True))
    ]
    times = [run.result["time"]["32"]["time_ratio"] for run in agent.runs if run.result["time"]]
    verdicts = [run.result["verdict"] for run in agent.runs]
    differ = len(set(verdicts)) > 1
    counted = all(run.result["policy_flops_counted"] for run in agent.runs)
    return [
        agent.name if counted else f"{agent.name} (its own FLOPs not counted)",
        str(len(agent.runs)),
        f"{int(agent.kept.sum())} of {len(agent.runs)}",
        ", ".join(f"{name} ({verdicts.count(name)})" if differ else name for name in dict.fromkeys(verdicts)),
        *figures,
        _mean([agent.areas], ".3f"),
        f"{np.mean(times):.0%}" if times else "-",
    ]


def _mean(scores: Scores, form: str) -> str:
    """The mean over all envs, with the interval if there are several runs of each."""
    mean, low, high = aggregate(scores)
    return _interval(mean, low, high, form) if min(map(len, scores)) > 1 else f"{mean:{form}}"


def agents_on_all(envs: Sequence[EnvRuns]) -> dict[str, list[AgentRuns]]:
    """The agents that have runs on every env, by name, the best first."""
    by_name = [{agent.name: agent for agent in env.agents} for env in envs]
    shared = {name: [agents[name] for agents in by_name] for name in sorted(set.intersection(*map(set, by_name)))}
    return dict(sorted(shared.items(), key=lambda item: -aggregate(_scores(item[1]))[0]))


def overall_tables(envs: Sequence[EnvRuns]) -> list[Table]:
    """Over all envs: savings with the quality kept, and the probability that one agent is better than another."""
    shared = agents_on_all(envs)
    rows = []
    pairs = []
    for name, agents in shared.items():
        runs, kept = sum(len(agent.runs) for agent in agents), sum(int(agent.kept.sum()) for agent in agents)
        rows.append([name, str(runs), _mean(_scores(agents), SAVED), f"{kept} of {runs}"])
    tables = [Table("FLOPs saved with the quality kept, over all envs", ["agent", "runs", "saved", "kept"], rows)]
    for first, second in combinations(shared, 2):
        scores = _scores(shared[first]), _scores(shared[second])
        better, low, high = probability_of_improvement(*scores)
        probability, differ = f"{better:.0%}", f"takes {FEWEST_RUNS} runs each"
        if enough_runs(*scores):
            probability, differ = _interval(better, low, high), "yes" if low > 0.5 or high < 0.5 else "no"
        pairs.append([first, second, probability, differ])
    if pairs:
        columns = ["agent", "better than", "probability", "told apart"]
        tables.append(Table("Probability of improvement, a run against a run on the same env", columns, pairs))
    return tables


def overall_sentences(envs: Sequence[EnvRuns]) -> list[str]:
    """Which agent is best over all envs; empty if no learned agent has runs on several envs."""
    shared = agents_on_all(envs)
    means = {name: aggregate(_scores(agents)) for name, agents in shared.items()}
    learned = [name for name, agents in shared.items() if not agents[0].is_control]
    if len(envs) < 2 or not learned:
        return []
    first, *others = learned
    controls = ", ".join(f"{name} {means[name][0]:.1%}" for name in shared if name not in learned)
    against = f"; the controls save: {controls}" if controls else ""
    return [
        f"{first} saves most with the quality kept: {_mean(_scores(shared[first]), SAVED)} of the FLOPs{against}.",
        *(_against(shared[first], shared[other]) for other in others),
    ]


def levels_table(env: EnvRuns) -> Table:
    """FLOPs of each agent against difficulty."""
    levels = env.agents[0].levels
    columns = ["agent", *(f"level {level['difficulty']} (n={level['instances']})" for level in levels)]
    rows = [
        [agent.name, *(f"{level['flops_ratio_with_policy']:.1%}" for level in agent.levels)] for agent in env.agents
    ]
    return Table("FLOPs against difficulty", columns, rows)


def reproduction_table(env: EnvRuns) -> Table:
    """A row per run: its command, its seed and its folder."""
    rows = [
        [agent.name, *(cell(run.config.get(key)) for key in ("seed", "steps", "command")), run.folder.name]
        for agent, run in env.runs
    ]
    return Table("Runs", ["agent", "seed", "steps", "command", "folder"], rows)


def cell(value: Any) -> str:
    """A value as a cell; ``None``: it is not known."""
    return "-" if value is None else str(value)


def versions_table(envs: Sequence[EnvRuns]) -> Table:
    """Versions of libraries, and hashes of data and backbones, of all runs."""
    values: dict[tuple[str, str], dict[str, None]] = {}
    for env, run in [(of_env, run) for of_env in envs for _, run in of_env.runs]:
        for name, version in run.config.get("versions", {}).items():
            values.setdefault(("all", name), {})[version] = None
        for split, data in run.config["data"].items():
            values.setdefault((env.name, f"{split} rows, hash"), {})[data["hash"]] = None
        values.setdefault((env.name, "backbone, hash of its weights"), {})[str(run.config["weights"])] = None
    cells = [[where, what, ", ".join(different)] for (where, what), different in values.items()]
    return Table("Versions, data and backbones", ["env", "what", "value"], cells)
