"""Trains every agent on every Mini env with several seeds, and prints the table of README.

    python benchmarks/agents.py --output runs/agents

Finished runs are kept, so the command can be interrupted and started again. A few minutes a run on 2 cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from sd_gym.agents.common.compare import COLUMNS, comparison
from sd_gym.agents.common.run import train

import sd_gym

MINI = [identity for identity in sd_gym.registered_ids() if "Mini" in identity]


def main() -> None:
    """Train what is not trained yet, then print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/agents"))
    parser.add_argument("--envs", nargs="+", default=MINI)
    parser.add_argument("--algos", nargs="+", default=["ppo", "a2c", "reinforce", "blind-ppo", "dense"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100_000)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    folders = []
    for seed in arguments.seeds:
        for env in arguments.envs:
            for algo in arguments.algos:
                folder = arguments.output / f"{env.removeprefix('SD/').removesuffix('-v0')}-{algo}-{seed}"
                folders.append(folder)
                if (folder / "result.json").exists():
                    continue
                result = train(env, algo, folder, steps=arguments.steps, seed=seed)
                console.print(
                    f"{folder.name}: quality {result['quality_difference'] * 100:+.2f} points, "
                    f"FLOPs {result['flops_ratio_with_policy']:.1%}, {result['decisions_used']} decisions",
                    highlight=False,
                )
    lines = [COLUMNS, ["---"] * len(COLUMNS), *comparison(folders)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
