"""Trains every agent and control on every Mini env with several seeds, and prints the tables of docs/results.md.

    python benchmarks/agents.py --output runs/agents

For each env: the best static masks are searched once, and once how far down their path each training instance can go;
``imitation`` learns to foresee that, for each seed; the learning agents start from there and refine. The blind control
(the same agent, its observation zeroed) starts from the best static mask. ``ppo-from-static`` and ``ppo-from-nothing``
(likewise of any learning agent) show what the start is worth. What is finished is kept and what was cut off goes on, so
the command can be started again, and twice at the same time with other ``--envs``. ``--table`` only prints what is
there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from sd_gym.agents.common.compare import COLUMNS, comparison
from sd_gym.agents.common.fronts import Front, flops_at_loss, front_of, saved_more
from sd_gym.agents.common.run import load_run, train
from sd_gym.agents.common.selection import MARGINS

import sd_gym
from sd_gym.policy import DecisionPolicy

MINI = [identity for identity in sd_gym.registered_ids() if "Mini" in identity]
REFINE = {  # settings of the learning agents, which start from what imitation has learned
    "ppo": {"objective": "lagrangian", "learning_rate": 2e-4},
    "ppo_lex": {"learning_rate": 2e-4},
    "a2c": {"objective": "lagrangian", "learning_rate": 2e-4, "entropy": 0.0},
    "a2c_lex": {"learning_rate": 2e-4, "entropy": 0.0},
    "reinforce": {"learning_rate": 2e-4, "alpha": 30.0, "beta": 30.0},
}
BLIND_RATE = 1e-3  # of learning: a blind agent has no more than its biases to learn
LOSS = 0.005  # of mean quality, at which fronts are compared: half of epsilon
VERSIONS = [margin for margin in np.arange(-3.0, 3.01, 0.5)]  # of a policy, bolder and more cautious than selected
console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """Where the runs of one env are, and how long they learn."""

    env: str
    output: Path
    steps: int

    def folder(self, algo: str, seed: int = 0) -> Path:
        """Of one run."""
        return self.output / f"{self.env.removeprefix('SD/').removesuffix('-v0')}-{algo}-{seed}"

    def run(self, algo: str, seed: int = 0, name: str | None = None, **settings: object) -> Path:
        """Train, unless it was done."""
        folder = self.folder(name or algo, seed)
        if not (folder / "result.json").exists():
            result = train(self.env, algo, folder, steps=self.steps, seed=seed, settings=settings, resume=True)
            console.print(
                f"{folder.name}: quality {result['quality_difference'] * 100:+.2f} points, "
                f"FLOPs {result['flops_ratio_with_policy']:.1%}, {result['decisions_used']} decisions",
                highlight=False,
            )
        return folder

    def imitate(self, seed: int) -> Path:
        """What most agents start from; all seeds learn from the search of the first."""
        return self.run("imitation", seed, path=self.imitate(0) if seed else self.run("static"))

    def learn(self, name: str, seed: int) -> None:
        """One agent with what it starts from."""
        static = self.run("static")
        algo, _, origin = name.partition("-from-")
        if algo.startswith("blind-"):
            self.run(algo, seed, **{**REFINE[algo.removeprefix("blind-")], "learning_rate": BLIND_RATE}, start=static)
        elif algo in REFINE:
            origin_run = {"static": static, "nothing": None}[origin] if origin else self.imitate(seed)
            self.run(algo, seed, name, **REFINE[algo], start=origin_run)
        elif algo == "imitation":
            self.imitate(seed)
        elif algo != "static":
            self.run(algo, seed)


def fronts(plan: Plan, seeds: list[int]) -> dict[str, Front]:
    """The fronts on the test split that agents are compared with: static masks, and versions of the blind agent."""
    _, core, _ = load_run(plan.folder("static"))
    split = core.split("test")
    masks = json.loads((plan.folder("static") / "masks.json").read_text(encoding="utf-8"))
    like = DecisionPolicy.load(plan.folder("static"))
    found = {"static": front_of(core, split, [like.with_decision(np.array(mask)) for mask in masks])}
    blind = [plan.folder("blind-ppo", seed) for seed in seeds]
    policies = [DecisionPolicy.load(folder) for folder in blind if (folder / "result.json").exists()]
    if policies:
        found["blind"] = front_of(core, split, [policy.with_margin(m) for policy in policies for m in MARGINS])
    return found


def savings_rows(plan: Plan, algos: list[str], seeds: list[int]) -> list[list[str]]:
    """How much more of the FLOPs the versions of each run's policy save than the controls, at the same quality."""
    against, rows = fronts(plan, seeds), []
    for algo in algos:
        folders = [folder for seed in seeds if (folder := plan.folder(algo, seed)).joinpath("result.json").exists()]
        if not folders or algo in ("static", "blind-ppo"):
            continue
        cells, costs = {name: [] for name in against}, []
        for folder in folders:
            _, core, policy = load_run(folder)
            versions = [policy.with_margin(margin) for margin in VERSIONS]
            front = front_of(core, core.split("test"), versions)
            costs.append(flops_at_loss(front, LOSS))
            for name, other in against.items():
                cells[name].append(saved_more(front, other, LOSS))
        shown = [f"{100 * np.mean(costs):.1f}% ({100 * max(costs):.1f}%)"]
        for name in ("static", "blind"):
            values = np.array(cells.get(name, []))
            if not len(values):
                shown += ["-", "-"]
                continue
            worst = values[values[:, 0].argmin()]
            interval = f"{100 * worst[1]:+.1f} to {100 * worst[2]:+.1f}"
            shown.append(f"{100 * values[:, 0].mean():+.1f} (worst {100 * worst[0]:+.1f}, {interval})")
            shown.append(f"{(values[:, 1] > 0).sum()} of {len(values)}")
        controls = [f"{100 * flops_at_loss(against[name], LOSS):.1f}%" for name in against]
        rows.append([plan.env, algo, str(len(folders)), " / ".join(controls), *shown])
    return rows


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def main() -> None:
    """Train what is not trained yet, then print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/agents"))
    parser.add_argument("--envs", nargs="+", default=MINI)
    parser.add_argument("--algos", nargs="+", default=["ppo", "a2c", "reinforce", "imitation", "blind-ppo", "static"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    arguments = parser.parse_args()
    plans = [Plan(env, arguments.output, arguments.steps) for env in arguments.envs]
    if not arguments.table:
        for seed in arguments.seeds:
            for plan in plans:
                for algo in arguments.algos:
                    plan.learn(algo, seed)
    there = [
        folder
        for plan in plans
        for algo in arguments.algos
        for seed in arguments.seeds
        if (folder := plan.folder(algo, seed)).joinpath("result.json").exists()
    ]
    print(markdown(COLUMNS, comparison(there)), end="\n\n")
    print(f"At a loss of {100 * LOSS:g} points, read off fronts:", end="\n\n")
    columns = [
        "env",
        "agent",
        "seeds",
        "FLOPs of static / blind",
        "FLOPs (worst)",
        "saved more than static masks, points",
        "above zero",
        "than blind",
        "above zero",
    ]
    print(markdown(columns, [row for plan in plans for row in savings_rows(plan, arguments.algos, arguments.seeds)]))


if __name__ == "__main__":
    main()
