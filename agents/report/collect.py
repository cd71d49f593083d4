"""Runs gathered for a report: by task, then by agent, with what is worth a sentence or a row of a table."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.report.panels import Points, Strip
from sd_gym.agents.runs.finished import Run, agent_label, finished_runs, group_by_settings, read_run
from sd_gym.agents.runs.statistics import aggregate, hypervolume
from sd_gym.agents.runs.verdict import Verdict, changes_allowed, fewest_instances, losses_allowed

WORST = 5  # epsilons lost: where the area that runs dominate ends
DEFAULT_EPSILON = 0.01
EACH_LEVEL, MOST_STRIPS = 3, 14


@dataclass(frozen=True)
class AgentRuns:
    """The runs of one agent on one task; they differ in their seed only.

    Attributes:
        name: Of the agent, and what sets these runs apart from others of it.
        algo: As ``--algo`` takes it.
        runs: The runs.
    """

    name: str
    algo: str
    runs: list[Run]

    @property
    def is_control(self) -> bool:
        """Whether it is there to be compared with."""
        return self.runs[0].config["control"]

    def values(self, key: str) -> NDArray:
        """A number of each run's result, ``[runs]``."""
        return np.array([float(run.result[key]) for run in self.runs])

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
        """Which runs keep the quality, bool ``[runs]``; none where there are too few instances, whatever they say."""
        return np.array([run.result["quality_kept"] and can_tell(run) for run in self.runs])

    @property
    def verdicts(self) -> list[str]:
        """What each run says."""
        return [run.result.get("verdict", "-") if can_tell(run) else str(Verdict.TOO_FEW) for run in self.runs]

    @cached_property
    def score(self) -> NDArray:
        """Quality first: the share of FLOPs that a run saves, and 0 where its quality is not shown to be kept."""
        return np.where(self.kept, 1 - self.values("flops_ratio_with_policy"), 0.0)

    @property
    def points(self) -> Points:
        """Its results, to be drawn."""
        last = [one for run in self.runs if (one := run.result.get("last_policy"))]
        learned = (
            np.array([100 * one[key] for one in last]) for key in ("quality_difference", "flops_ratio_with_policy")
        )
        return Points(self.difference, self.flops, *learned)

    @property
    def areas(self) -> NDArray:
        """The area that what a run selected and what it had learned dominate, from 0 (dense) to 1, ``[runs]``.

        1 is to lose nothing and run nothing; ``WORST`` times epsilon (of 0: of the default) is as good as losing all.
        """
        found = []
        for run in self.runs:
            ends = [run.result, *filter(None, [run.result.get("last_policy")])]
            loss = np.array([one["quality_difference"] for one in ends]) / (
                WORST * (epsilon_of(run) or DEFAULT_EPSILON)
            )
            found.append(hypervolume(1 + loss, np.array([one["flops_ratio_with_policy"] for one in ends]), (0.0, 1.0)))
        return np.array(found)

    @property
    def levels(self) -> list[dict[str, Any]]:
        """``by_difficulty``, means over runs."""
        first = self.runs[0].result["by_difficulty"]
        means = [
            {
                key: np.mean([run.result["by_difficulty"][number][key] for run in self.runs], axis=0)
                for key in ("flops_ratio", "skip_rate")
                if key in first[number]
            }
            for number in range(len(first))
        ]
        return [level | mean for level, mean in zip(first, means, strict=True)]

    @property
    def histories(self) -> list[list[dict[str, Any]]]:
        """What validation has seen of each run that learned step by step."""
        return [history for run in self.runs if len(history := run.result.get("history", [])) > 1]

    @property
    def middle(self) -> Run:
        """The run whose FLOPs are the median."""
        return self.runs[int(np.argsort(self.flops, kind="stable")[(len(self.runs) - 1) // 2])]


@dataclass(frozen=True)
class Task:
    """All runs on the same test instances with the same backbone and epsilon.

    Attributes:
        name: The env's id, and what sets it apart from others of that id.
        agents: Their runs, agents first, the cheapest that keeps the quality at the top, then controls.
    """

    name: str
    agents: list[AgentRuns]

    @property
    def first(self) -> Run:
        """Any of its runs."""
        return self.agents[0].runs[0]

    @property
    def learned(self) -> list[AgentRuns]:
        """What is no control."""
        return [one for one in self.agents if not one.is_control]

    @property
    def epsilon(self) -> float:
        """How much mean quality may be lost."""
        return epsilon_of(self.first)

    @property
    def instances(self) -> int:
        """Of the test split."""
        return self.first.result["instances"]

    @property
    def power(self) -> tuple[float, int | None, int | None]:
        """The fewest instances for any verdict; how many answers may be lost here, and how many may change."""
        n, epsilon = self.instances, self.epsilon
        return fewest_instances(epsilon), losses_allowed(n, epsilon), changes_allowed(n, epsilon)

    @property
    def switches(self) -> list[str]:
        """Names of the switches."""
        return list(self.first.result.get("skip_rate", {}))


def collect(folders: Iterable[str | Path]) -> list[Task]:
    """Read runs and sort them.

    Raises:
        FileNotFoundError: If no folder holds a finished run.
        ValueError: If what one holds is damaged.

    Warns:
        UserWarning: As ``compare``.
    """
    tasks: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for folder in finished_runs(folders):
        run = read_run(folder)
        tasks.setdefault(_key(run), {}).setdefault(agent_label(run.config), []).append(run)
    ids = [key[0] for key in tasks]
    return [
        Task(key[0] if ids.count(key[0]) == 1 else _told_apart(key), _agents(agents))
        for key, agents in sorted(tasks.items())
    ]


def epsilon_of(run: Run) -> float:
    """How much mean quality a run may lose."""
    return run.result.get("epsilon", run.env.reward.epsilon)


def can_tell(run: Run) -> bool:
    """Whether a run has so many test instances that any result could show that the quality is kept."""
    return losses_allowed(run.result["instances"], epsilon_of(run)) is not None


def strips(run: Run) -> list[Strip]:
    """Some instances of a run: of each level the first ones, and then those that lost something.

    Nothing if the folder has no ``instances.csv``.
    """
    file, switches = run.folder / "instances.csv", len(run.result.get("skip_rate", {}))
    if not file.exists() or not switches:
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    allowed, shares = epsilon_of(run), run.env.tokens.shares

    def lost(row: dict[str, str]) -> bool:
        return float(row["quality_ref"]) - float(row["quality"]) > allowed

    levels = sorted({int(row["level"]) for row in rows})
    chosen = [row for level in levels for row in [one for one in rows if int(one["level"]) == level][:EACH_LEVEL]]
    chosen += [row for row in rows if lost(row) and row not in chosen][: max(0, MOST_STRIPS - len(chosen))]
    return [
        Strip(
            f"{row['id']}, level {row['level']}",
            np.array([digit == "1" for digit in row["decision"][:switches]]),
            float(row["flops_ratio"]),
            lost(row),
            float(shares[int(row["decision"][switches:] or 0)]),
        )
        for row in chosen
    ]


def _key(run: Run) -> tuple[str, ...]:
    config, test = run.config, run.result.get("data", {}).get("test", {})
    backbone = config["weights"]
    return config["env"], str(test.get("hash", run.result["instances"])), f"{epsilon_of(run):g}", backbone


def _told_apart(key: tuple[str, ...]) -> str:
    env, data, epsilon, backbone = key
    return f"{env} (test rows {data}, epsilon {epsilon}, backbone {backbone[:12]})"


def _agents(agents: dict[str, list[Run]]) -> list[AgentRuns]:
    found = [
        AgentRuns(name, runs[0].config["algo"], runs)
        for agent, of_agent in agents.items()
        for name, runs in group_by_settings(agent, of_agent)
    ]
    return sorted(found, key=lambda one: (one.is_control, -aggregate([one.score], samples=1)[0], one.name))
