"""Trains agents from scratch next to a plain PPO script, for the same number of decisions, and prints a table.

    python benchmarks/from_scratch.py --algos script ppo a2c reinforce
    python benchmarks/from_scratch.py --envs SD/Classification-TREC-Table-v1 --algos hull ppo --steps 20000 200000

``script`` is ``examples/own_ppo.py``, run as an agent, so its policy is validated and selected like all others. The
table shows two policies of each run: the one at the end of learning, and the one selected on the validation split.
Means over seeds with 95% intervals (Student's t). Finished runs are kept and interrupted ones resumed, so the command
can be given again, and twice at once with different ``--envs``. ``--table`` only prints what is there. ``sd-gym
report`` draws the learning curves of the runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sd_gym.agents.experiment.comparison_plan import PlannedRun
from sd_gym.agents.experiment.parallel import RunStatus, train_many
from sd_gym.agents.learning.agent import INFO_KEYS, Agent, AgentSettings, OnRollout, Rollout
from sd_gym.agents.registry import register_agent
from sd_gym.agents.report.compare import markdown
from sd_gym.agents.runs.folder import read_result
from sd_gym.agents.runs.statistics import half_interval
from stable_baselines3.common.logger import Logger

import sd_gym
from sd_gym.policy import DecisionPolicy

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import own_ppo

MINI = [identity for identity in sd_gym.registered_ids() if identity.endswith("-Mini-v0")]
AGENTS = ["script", "ppo", "a2c", "reinforce"]
COLUMNS = ["env", "decisions", "agent", "seeds", "FLOPs as learned (points)", "FLOPs as selected (points)"]
COLUMNS += ["return", "score", "kept"]
console = Console(stderr=True)


class ScriptSettings(AgentSettings):
    """The script's own number of envs."""

    num_envs: int = own_ppo.ENVS


class Script(Agent):
    """``examples/own_ppo.py`` as an agent."""

    Settings = ScriptSettings

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """The script's loop, with a validation now and then."""
        nothing = {key: np.zeros(1) for key in INFO_KEYS}
        for steps, policy in own_ppo.learn(self.env, total_steps, self.seed):
            self._policy = policy
            on_rollout(Rollout(steps, np.zeros(1), nothing))

    def policy(self) -> DecisionPolicy:
        """The script's weights in the project's network, which is the same one."""
        exported = self.new_policy()
        for ours, theirs in zip([*exported.body, exported.head], self._policy.logits, strict=True):
            ours.load_state_dict(theirs.state_dict())
        return exported.eval()


register_agent("script", Script)


def folder_of(output: Path, env: str, name: str, steps: int, seed: int) -> Path:
    """Of one run."""
    short = env.removeprefix("SD/").removesuffix("-v0")
    return output / f"{short}-{steps}" / f"{name}-{seed}"


def show(status: RunStatus) -> None:
    """A line for each run that is done."""
    if status.state == "failed":
        console.print(f"{status.run.folder}: {status.message}", style="red", highlight=False, soft_wrap=True)
    elif status.state == "finished":
        result = read_result(status.run.folder)
        line = f"{status.run.folder}: as learned {cell([result['last_policy']])}, selected {cell([result])}"
        console.print(line, highlight=False, soft_wrap=True)


def cell(results: list[dict[str, Any]]) -> str:
    """Mean FLOPs, with a 95% interval (Student's t) where there are several results, and the mean points lost."""
    flops = 100 * np.array([result["flops_ratio_with_policy"] for result in results])
    points = 100 * np.mean([result["quality_difference"] for result in results])
    spread = f"±{half_interval(flops):.1f}" if len(flops) > 1 else ""
    return f"{flops.mean():.1f}%{spread} ({points:+.2f})"


def main() -> None:
    """Train what is not trained yet, then print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/from_scratch"))
    parser.add_argument("--envs", nargs="+", default=MINI)
    parser.add_argument("--algos", nargs="+", default=AGENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", nargs="+", type=int, default=[20_000])
    parser.add_argument("--jobs", type=int, default=1, help="processes, which share the cores")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    arguments = parser.parse_args()
    cases = [(env, steps) for env in arguments.envs for steps in arguments.steps]
    if not arguments.table:
        runs = [
            PlannedRun(env, name, folder_of(arguments.output, env, name, steps, seed), steps, seed, {})
            for seed in arguments.seeds
            for env, steps in cases
            for name in arguments.algos
        ]
        train_many(runs, jobs=arguments.jobs, imports=[str(Path(__file__).resolve())], on_status=show)
    rows = []
    for env, steps in cases:
        for name in arguments.algos:
            folders = [folder_of(arguments.output, env, name, steps, seed) for seed in arguments.seeds]
            folders = [folder for folder in folders if (folder / "result.json").exists()]
            results = [read_result(folder) for folder in folders]
            if results:
                kept = f"{sum(result['quality_kept'] for result in results)} of {len(results)}"
                learned = cell([result["last_policy"] for result in results])
                scores = [result["normalised_score"] for result in results]
                score = "-" if None in scores else f"{np.mean(scores):.2f}"
                gained = f"{np.mean([result['return'] for result in results]):.3f}"
                rows.append([env, f"{steps:,}", name, str(len(results)), learned, cell(results)])
                rows[-1] += [gained, score, kept]
    print(markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
