"""Trains every agent and control on every Mini env with several seeds, and prints the tables of docs/results.md.

    python benchmarks/agents.py --output runs/agents

For each env: the best static masks are searched once, and once what each training instance loses under the masks of
their path; ``imitation`` learns to foresee that, for each seed; the learning agents start from there and refine. The
blind control (the same agent, its observation zeroed) starts from the best static mask. ``ppo-from-static`` and
``ppo-from-nothing`` (likewise of any learning agent) show what the start is worth. What is finished is kept and what
was cut off goes on, so the command can be started again, and twice at the same time with other ``--envs``. ``--table``
only prints what is there.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from rich.console import Console
from sd_gym.agents.experiment import savings
from sd_gym.agents.experiment.many import Word, train_many
from sd_gym.agents.experiment.plan import Planned
from sd_gym.agents.registry import learning_agents
from sd_gym.agents.report import compare, plots
from sd_gym.agents.report.compare import markdown
from sd_gym.agents.runs.folder import read_result

import sd_gym

MINI = [identity for identity in sd_gym.registered_ids() if identity.endswith("-Mini-v0")]
AGENTS = ["ppo_lagrangian", "a2c", "reinforce", "imitation", "blind-ppo_lagrangian", "static"]
console = Console(stderr=True)


@dataclass
class Plan:
    """The runs of one env, how long they learn, and where they are."""

    env: str
    output: Path
    steps: int
    runs: dict[Path, Planned] = field(default_factory=dict)

    def folder(self, algo: str, seed: int = 0) -> Path:
        """Of one run."""
        return self.output / f"{self.env.removeprefix('SD/').removesuffix('-v0')}-{algo}-{seed}"

    def run(self, algo: str, seed: int = 0, name: str | None = None, **settings: object) -> Path:
        """Plan one."""
        folder = self.folder(name or algo, seed)
        self.runs[folder] = Planned(self.env, algo, folder, self.steps, seed, settings)
        return folder

    def imitate(self, seed: int) -> Path:
        """What most agents start from; all seeds learn from the search of the first."""
        return self.run("imitation", seed, path=self.imitate(0) if seed else self.run("static"))

    def learn(self, name: str, seed: int) -> None:
        """One agent with what it starts from."""
        algo, _, origin = name.partition("-from-")
        if algo.startswith("blind-"):
            self.run(algo, seed, start=self.run("static"))
        elif algo == "imitation":
            self.imitate(seed)
        elif algo in learning_agents():
            start = {"": self.imitate, "static": lambda _: self.run("static"), "nothing": lambda _: None}[origin](seed)
            self.run(algo, seed, name, start=start)
        else:
            self.run(algo, 0 if algo == "static" else seed)


def show(word: Word) -> None:
    """A line for each run that is done."""
    if word.state == "failed":
        console.print(f"{word.run.folder.name}: {word.message}", style="red", highlight=False)
    elif word.state == "finished":
        result = read_result(word.run.folder)
        console.print(
            f"{word.run.folder.name}: quality {result['quality_difference'] * 100:+.2f} points, "
            f"FLOPs {result['flops_ratio_with_policy']:.1%}, {result['decisions_used']} decisions",
            highlight=False,
        )


def main() -> None:
    """Train what is not trained yet, then print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/agents"))
    parser.add_argument("--envs", nargs="+", default=MINI)
    parser.add_argument("--algos", nargs="+", default=AGENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=1, help="processes, which share the cores")
    parser.add_argument("--test-size", type=int, help="instances that fronts are read on; otherwise those of the runs")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    arguments = parser.parse_args()
    plans = [Plan(env, arguments.output, arguments.steps) for env in arguments.envs]
    if not arguments.table:
        for seed, plan, algo in product(arguments.seeds, plans, arguments.algos):
            plan.learn(algo, seed)
        runs = sorted((run for plan in plans for run in plan.runs.values()), key=lambda run: run.seed)
        train_many(runs, jobs=arguments.jobs, on_word=show)
    there = [
        folder
        for plan in plans
        for algo in arguments.algos
        for seed in arguments.seeds
        if (folder := plan.folder(algo, seed)).joinpath("result.json").exists()
    ]
    print(markdown(compare.COLUMNS, [compare.cells(row) for row in compare.compare(there)]), end="\n\n")
    algos = {algo.partition("-from-")[0] for algo in arguments.algos}
    if algos & {"static", "blind-ppo_lagrangian"} and algos & set(learning_agents()):
        print("At the same quality, read off fronts:", end="\n\n")
        fronts = savings.env_fronts(there, arguments.test_size)
        print(markdown(savings.COLUMNS, [row for one in fronts for row in savings.savings(one)]))
        plots.plot_fronts(fronts, arguments.output / "fronts.png")


if __name__ == "__main__":
    main()
