"""Runs for a report, by env and agent, with the figures of its sentences and tables."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.report.charts import ExampleDecision
from sd_gym.agents.runs.finished_runs import Run, finished_runs, group_by_agent, grouped
from sd_gym.agents.runs.folder import instance_rows
from sd_gym.agents.runs.statistics import aggregate, hypervolume, interquartile_mean

WORST = 5  # loss, in epsilons, at which the area of a run is 0
DEFAULT_EPSILON = 0.01
EXAMPLES_PER_LEVEL, MOST_EXAMPLES = 3, 14


@dataclass(frozen=True)
class AgentRuns:
    """The runs of one agent on one env; they differ in their seed only."""

    name: str  # the agent's name, and how these runs differ from its other runs
    runs: list[Run]

    @property
    def is_control(self) -> bool:
        """Whether it is a control baseline."""
        return self.runs[0].config["control"]

    def values(self, key: str, *, as_learned: bool = False) -> NDArray:
        """A value of all results that have it, ``[runs]``; or of policies as learned, before selection."""
        results = [(run.result["last_policy"] or {}) if as_learned else run.result for run in self.runs]
        return np.array([float(result[key]) for result in results if result.get(key) is not None])

    @property
    def flops(self) -> NDArray:
        """FLOPs, the policy's own included, % of dense, ``[runs]``."""
        return 100 * self.values("flops_ratio_with_policy")

    @property
    def mean_flops(self) -> float:
        """The interquartile mean of ``flops``."""
        return float(interquartile_mean(self.flops))

    @cached_property
    def kept(self) -> NDArray:
        """Which runs keep the quality, bool ``[runs]``."""
        return np.array([run.result["quality_kept"] for run in self.runs])

    @cached_property
    def score(self) -> NDArray:
        """The share of FLOPs that each run saves; 0 if its quality is not shown to be kept.

        It is at least 0: deciding costs FLOPs, so a policy that runs all densely would rank below one that fails.
        """
        return np.where(self.kept, np.maximum(1 - self.values("flops_ratio_with_policy"), 0.0), 0.0)

    @property
    def areas(self) -> NDArray:
        """The area dominated by a run's selected and last policies, from 0 (dense), ``[runs]``.

        1 means no loss and no FLOPs, and gains add to it. 0 means a loss of ``WORST`` times epsilon (or
        ``DEFAULT_EPSILON``, if that is 0).
        """
        areas = []
        for run in self.runs:
            ends = [run.result, *filter(None, [run.result["last_policy"]])]
            worst = WORST * (run.result["epsilon"] or DEFAULT_EPSILON)
            loss = np.array([end["quality_difference"] for end in ends]) / worst
            areas.append(hypervolume(1 + loss, np.array([end["flops_ratio_with_policy"] for end in ends]), (0.0, 1.0)))
        return np.array(areas)

    @property
    def levels(self) -> list[dict[str, Any]]:
        """``by_difficulty``, means over runs."""
        means = []
        for levels in zip(*(run.result["by_difficulty"] for run in self.runs), strict=True):
            keys = [key for key in ("flops_ratio_with_policy", "skip_rate") if key in levels[0]]
            means.append(levels[0] | {key: np.mean([level[key] for level in levels], axis=0) for key in keys})
        return means

    @property
    def median_run(self) -> Run:
        """The run whose FLOPs are the median."""
        return self.runs[int(np.argsort(self.flops, kind="stable")[(len(self.runs) - 1) // 2])]


@dataclass(frozen=True)
class EnvRuns:
    """All runs on the same test instances with the same backbone, epsilon and measure of quality."""

    name: str  # the env's id, and how these runs differ from others of this id
    agents: list[AgentRuns]  # agents, then controls, each by falling score

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
    def best(self) -> AgentRuns | None:
        """The agent that saves most, if possible one that keeps the quality in all runs; ``None``: all are controls."""
        return next((agent for agent in self.learned if agent.kept.all()), next(iter(self.learned), None))

    @property
    def epsilon(self) -> float:
        """How much mean quality may be lost."""
        return self.first.result["epsilon"]

    @property
    def switches(self) -> list[str]:
        """Names of the switches."""
        return list(self.first.result["skip_rate"])


def collect(folders: Iterable[str | Path]) -> list[EnvRuns]:
    """Read runs and sort them; raises and warns as ``sd_gym.compare``.

    Runs of serving envs are left out, with a warning; ``ValueError`` if there are no others.
    """
    runs = finished_runs(folders)
    if serving := [str(run.folder) for run in runs if run.is_serving]:
        message = f"a report shows no runs of serving envs ({', '.join(serving)}); use sd-gym compare"
        if len(serving) == len(runs):
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    by_env, collected = grouped((run for run in runs if not run.is_serving), _key), []
    ids = [env for env, *_ in by_env]
    for (env, data, epsilon, backbone, measured), of_env in by_env.items():
        apart = f" (test rows {data}, epsilon {epsilon}, backbone {backbone[:12]}, {measured})"
        agents = [AgentRuns(name, of_agent) for name, of_agent in group_by_agent(of_env)]
        agents.sort(key=lambda agent: (agent.is_control, -aggregate([agent.score], samples=1)[0], agent.name))
        collected.append(EnvRuns(env if ids.count(env) == 1 else env + apart, agents))
    return collected


def example_decisions(run: Run) -> list[ExampleDecision]:
    """Decisions of a run on the first instances of each level, then on others that lost quality.

    Empty if the folder has no ``instances.csv``; ``ValueError`` if that is damaged.
    """
    file, switches = run.folder / "instances.csv", len(run.result["skip_rate"])
    if not file.exists() or not switches:
        return []
    allowed, shares = run.result["epsilon"], run.env.tokens.shares

    def lost(row: dict[str, str]) -> bool:
        return float(row["quality_ref"]) - float(row["quality"]) > allowed

    by_level: dict[int, list[dict[str, str]]] = {}
    with instance_rows(file) as rows:
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
                float(shares[int(row["decision"][switches:])]),
                row.get("goes_on") == "True",
            )
            for row in chosen
        ]


def _key(run: Run) -> tuple[str, str, str, str, str]:
    """Env, test rows, epsilon, backbone, and how quality is measured."""
    result, quality, backbone = run.result, run.env.quality, run.env.backbone
    measured = quality.kind if quality.kind != "metric" else quality.metric
    measured += f", inputs up to {backbone.max_source_length} and answers up to {backbone.max_target_length} tokens"
    return run.config["env"], result["data"]["test"]["hash"], f"{result['epsilon']:g}", run.config["weights"], measured
