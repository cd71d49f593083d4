"""Trains agents from scratch next to a plain PPO script, for the same number of decisions: a table and learning curves.

    python benchmarks/from_scratch.py --algos script ppo a2c reinforce
    python benchmarks/from_scratch.py --envs SD/Classification-TREC-Table-v1 --algos hull ppo --steps 20000 200000

``script`` is ``examples/own_ppo.py``, run as an agent, so its policy is validated and selected like all others. The
table shows two policies of each run: the one at the end of learning, and the one selected on the validation split.
Means over seeds with 95% intervals (Student's t). Finished runs are kept and interrupted ones resumed, so the command
can be given again, and twice at once with different ``--envs``. ``--table`` only prints what is there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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
        last = result["last_policy"]
        console.print(
            f"{status.run.folder}: as learned {last['flops_ratio_with_policy']:.1%} "
            f"({100 * last['quality_difference']:+.2f}), selected {result['flops_ratio_with_policy']:.1%} "
            f"({100 * result['quality_difference']:+.2f})",
            highlight=False,
            soft_wrap=True,
        )


def mean_flops(ratios: list[float]) -> str:
    """Their mean with its interval."""
    flops = 100 * np.array(ratios)
    spread = f"±{half_interval(flops):.1f}" if len(flops) > 1 else ""
    return f"{flops.mean():.1f}%{spread}"


def cell(results: list[dict[str, Any]]) -> str:
    """Mean FLOPs with its interval, and the points lost."""
    points = 100 * np.mean([result["quality_difference"] for result in results])
    return f"{mean_flops([result['flops_ratio_with_policy'] for result in results])} ({points:+.2f})"


def plot(curves: dict[str, dict[str, list[list[dict]]]], file: Path) -> None:
    """FLOPs and points lost on the validation split against decisions: means, and bands of their 95% intervals."""
    figure = Figure(figsize=(5 * len(curves), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(curves), squeeze=False, sharex="col")
    for column, (env, agents) in enumerate(curves.items()):
        for number, (name, runs) in enumerate(agents.items()):
            steps = np.mean([[entry["step"] for entry in history] for history in runs], axis=0)
            read = np.array([[[e["flops_ratio"], e["quality"] - e["quality_ref"]] for e in run] for run in runs])
            for row in range(2):
                values = 100 * read[:, :, row]
                mean, half = values.mean(axis=0), np.array([half_interval(column) for column in values.T])
                style = {"color": f"C{number}", "linestyle": "--" if name == "script" else "-"}
                axes[row, column].plot(steps, mean, label=name, marker="os^vD<"[number % 6], markersize=4, **style)
                axes[row, column].fill_between(steps, mean - half, mean + half, color=f"C{number}", alpha=0.12)
        axes[0, column].set(title=env, ylabel="FLOPs, % of dense", ylim=(0, 100))
        axes[1, column].set(xlabel="decisions", ylabel="points against dense", ylim=(-12, 1))
        axes[1, column].axhline(-1, color="0.5", linestyle=":", linewidth=1)
        for row in range(2):
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(file, dpi=100)


def main() -> None:
    """Train what is not trained yet, then print a Markdown table and draw the curves."""
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
    rows, curves = [], {}
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
                if all(len(result["history"]) > 1 for result in results):  # of those that learn step by step
                    runs = curves.setdefault(f"{env}, {steps:,} decisions", {})
                    runs[name] = [result["history"] for result in results]
    print(markdown(COLUMNS, rows))
    if curves:
        plot(curves, arguments.output / "curves.png")


if __name__ == "__main__":
    main()
