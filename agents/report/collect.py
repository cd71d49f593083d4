"""Runs gathered for a report: by env, then by agent, with the figures that sentences and tables need."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.report.charts import ExampleDecision, Points
from sd_gym.agents.runs.finished import Run, agent_label, finished_runs, group_by_settings, read_run
from sd_gym.agents.runs.statistics import aggregate, hypervolume
from sd_gym.agents.runs.verdict import Verdict, losses_allowed

WORST = 5  # epsilons lost: where the area that runs dominate ends
DEFAULT_EPSILON = 0.01
EXAMPLES_PER_LEVEL, MOST_EXAMPLES = 3, 14


@dataclass(frozen=True)
class AgentRuns:
    """The runs of one agent on one env; they differ in their seed only."""

    name: str  # of the agent, and what distinguishes these runs from its others
    algo: str  # as ``--algo`` takes it
    runs: list[Run]

    @property
    def is_control(self) -> bool:
        """Whether it is a control baseline."""
        return self.runs[0].config["control"]

    def values(self, key: str) -> NDArray:
        """A number of the result of each run that has it, ``[runs]``."""
        return _numbers([run.result for run in self.runs], key)

    def values_as_learned(self, key: str) -> NDArray:
        """The same of the policies at the end of learning, before selection, ``[runs that have one]``."""
        return _numbers([run.result["last_policy"] for run in self.runs if run.result.get("last_policy")], key)

    @property
    def difference(self) -> NDArray:
        """Quality against dense, in points, ``[runs]``."""
        return 100 * self.values("quality_difference")

    @property
    def flops(self) -> NDArray:
        """FLOPs, the policy's own included, % of dense, ``[runs]``."""
        return 100 * self.values("flops_ratio_with_policy")

    @cached_property
    def kept(self) -> NDArray:
        """Which runs keep the quality, bool ``[runs]``; false where the instances are too few for any verdict."""
        return np.array([run.result["quality_kept"] and can_tell(run) for run in self.runs])

    @property
    def verdicts(self) -> list[str]:
        """The verdict of each run."""
        return [run.result.get("verdict", "-") if can_tell(run) else str(Verdict.TOO_FEW) for run in self.runs]

    @cached_property
    def score(self) -> NDArray:
        """Quality first: the share of FLOPs that a run saves, and 0 where its quality is not shown to be kept."""
        return np.where(self.kept, 1 - self.values("flops_ratio_with_policy"), 0.0)

    @property
    def points(self) -> Points:
        """The results to draw."""
        learned = [100 * self.values_as_learned(key) for key in ("quality_difference", "flops_ratio_with_policy")]
        return Points(self.difference, self.flops, *learned)

    @property
    def areas(self) -> NDArray:
        """The area that a run's selected and last policies dominate, from 0 (dense) to 1, ``[runs]``.

        1 is to lose nothing and run nothing; ``WORST`` times epsilon (of 0: of the default) is as good as losing all.
        """
        areas = []
        for run in self.runs:
            ends = [run.result, *filter(None, [run.result.get("last_policy")])]
            worst = WORST * (epsilon_of(run) or DEFAULT_EPSILON)
            loss = np.array([end["quality_difference"] for end in ends]) / worst
            areas.append(hypervolume(1 + loss, np.array([end["flops_ratio_with_policy"] for end in ends]), (0.0, 1.0)))
        return np.array(areas)

    @property
    def levels(self) -> list[dict[str, Any]]:
        """``by_difficulty``, means over runs."""
        means = []
        for levels in zip(*(run.result["by_difficulty"] for run in self.runs), strict=True):
            keys = [key for key in ("flops_ratio", "skip_rate") if key in levels[0]]
            means.append(levels[0] | {key: np.mean([level[key] for level in levels], axis=0) for key in keys})
        return means

    @property
    def histories(self) -> list[list[dict[str, Any]]]:
        """The validations of each run that learned step by step."""
        return [history for run in self.runs if len(history := run.result.get("history", [])) > 1]

    @property
    def median_run(self) -> Run:
        """The run whose FLOPs are the median."""
        return self.runs[int(np.argsort(self.flops, kind="stable")[(len(self.runs) - 1) // 2])]


@dataclass(frozen=True)
class EnvRuns:
    """All runs on the same test instances with the same backbone and epsilon."""

    name: str  # the env's id, and what distinguishes these runs from others of that id
    agents: list[AgentRuns]  # agents first, the cheapest that keeps the quality at the top, then controls

    @property
    def runs(self) -> list[tuple[AgentRuns, Run]]:
        """All runs, each with its agent."""
        return [(agent, run) for agent in self.agents for run in agent.runs]

    @property
    def first(self) -> Run:
        """Any of its runs."""
        return self.agents[0].runs[0]

    @property
    def learned(self) -> list[AgentRuns]:
        """The agents that are not controls."""
        return [agent for agent in self.agents if not agent.is_control]

    @property
    def epsilon(self) -> float:
        """How much mean quality may be lost."""
        return epsilon_of(self.first)

    @property
    def instances(self) -> int:
        """Size of the test split."""
        return self.first.result["instances"]

    @property
    def switches(self) -> list[str]:
        """Names of the switches."""
        return list(self.first.result.get("skip_rate", {}))


def collect(folders: Iterable[str | Path]) -> list[EnvRuns]:
    """Read runs and sort them; raises and warns as ``sd_gym.compare``, and ``ValueError`` for a serving env."""
    envs: dict[tuple[str, str, str, str], dict[str, list[Run]]] = {}
    for folder in finished_runs(folders):
        run = read_run(folder)
        if run.is_serving:
            raise ValueError(f"{folder} is of a serving env, which a report does not show; use sd-gym compare")
        envs.setdefault(_key(run), {}).setdefault(agent_label(run.config), []).append(run)
    ids, found = [key[0] for key in envs], []
    for (env, data, epsilon, backbone), agents in sorted(envs.items()):
        apart = f" (test rows {data}, epsilon {epsilon}, backbone {backbone[:12]})"
        found.append(EnvRuns(env if ids.count(env) == 1 else env + apart, _agents(agents)))
    return found


def epsilon_of(run: Run) -> float:
    """How much mean quality a run may lose."""
    return run.result.get("epsilon", run.env.reward.epsilon)


def can_tell(run: Run) -> bool:
    """Whether a run has so many test instances that any result could show that the quality is kept."""
    return losses_allowed(run.result["instances"], epsilon_of(run)) is not None


def example_decisions(run: Run) -> list[ExampleDecision]:
    """Some decisions of a run: on the first instances of each level, then on instances that lost quality.

    Empty if the folder has no ``instances.csv``.
    """
    file, switches = run.folder / "instances.csv", len(run.result.get("skip_rate", {}))
    if not file.exists() or not switches:
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    allowed, shares = epsilon_of(run), run.env.tokens.shares

    def lost(row: dict[str, str]) -> bool:
        return float(row["quality_ref"]) - float(row["quality"]) > allowed

    by_level: dict[int, list[dict[str, str]]] = {}
    for row in rows:
        by_level.setdefault(int(row["level"]), []).append(row)
    chosen = [row for _, of_level in sorted(by_level.items()) for row in of_level[:EXAMPLES_PER_LEVEL]]
    chosen += [row for row in rows if lost(row) and row not in chosen][: max(0, MOST_EXAMPLES - len(chosen))]
    return [
        ExampleDecision(
            f"{row['id']}, level {row['level']}",
            np.array([digit == "1" for digit in row["decision"][:switches]]),
            float(row["flops_ratio"]),
            lost(row),
            float(shares[int(row["decision"][switches:] or 0)]),
        )
        for row in chosen
    ]


def _numbers(results: list[dict[str, Any]], key: str) -> NDArray:
    return np.array([float(result[key]) for result in results if result.get(key) is not None])


def _key(run: Run) -> tuple[str, str, str, str]:
    """Env, test rows, epsilon and backbone."""
    test = run.result.get("data", {}).get("test", {}).get("hash", run.result["instances"])
    return run.config["env"], str(test), f"{epsilon_of(run):g}", run.config["weights"]


def _agents(agents: dict[str, list[Run]]) -> list[AgentRuns]:
    all_runs = [
        AgentRuns(name, runs[0].config["algo"], runs)
        for agent, of_agent in agents.items()
        for name, runs in group_by_settings(agent, of_agent)
    ]
    return sorted(all_runs, key=lambda agent: (agent.is_control, -aggregate([agent.score], samples=1)[0], agent.name))
