"""What a deployment gets of a trained policy: attached, as a bank, compiled, in bfloat16, and as ONNX graphs.

    sd-gym reduce runs/reviews --codebook 8 --output runs/reviews-8
    python benchmarks/deployment.py runs/reviews-8

All answer the same texts, from text to answer, deciding included. They take turns, each with all texts, since what runs
alone finds its weights in the processor's cache. Rows "1" are single texts. Rows "8" and "32" are a queue of 64 texts,
of which at most so many run together, grouped by mask. The last are a file, which begins with the env's test rows.
"time" is over that of dense in eager, "own dense" over dense of the same engine; the latter leaves out tokenising,
which is the same for both. In ONNX Runtime, dense and one mask are graphs without branches. Promise kept = FLOPs / own
dense; 1 is all of it. "agree" is the share of answers that equal those of dense in eager. "quality" is the difference
to it on the test rows, with its paired bootstrap interval. Last, ONNX is compared with sd_gym.load on the texts of the
file and as many random ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from sd_gym.agents.runs.verdict import difference_interval

import sd_gym
from sd_gym.backbones.checks import has_bf16
from sd_gym.data.instance import Instance
from sd_gym.envs.config import make_config
from sd_gym.envs.shared import shared_core
from sd_gym.inference.answer import Answer, TextModel
from sd_gym.inference.onnx import OnnxModel
from sd_gym.policy.artefact import SkipPolicy

WARM_UP, QUEUE, QUEUES, COLUMNS = 1, 64, 4, ("FLOPs", "time", "own dense", "kept", "agree", "quality")
Texts = list[Any]


class Way(NamedTuple):
    """One way to answer texts, at most so many at once."""

    name: str
    answers: Callable[[Texts, int | None], list[Answer]]
    dense: str  # name of the dense of its engine
    tokenise: Callable[[Texts], Any]


class Plain(OnnxModel):
    """An export that runs everything under one mask, in a graph without branches."""

    def __init__(self, folder: Path, number: int, options: onnxruntime.SessionOptions) -> None:
        super().__init__(folder, session_options=options)
        self.masks, self._ratio = self.masks[[number]], self._ratio[:, [number]]
        self._skips, self._outputs = self._skips[number : number + 1], [["logits"]]

    def _opened(self, name: str) -> tuple[Any, list[str]]:
        model, fixed = onnx.load(self.folder / name, load_external_data=False), self._skips[0]
        inputs = [value for value in model.graph.input if value.name not in fixed]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(value, of) for of, value in fixed.items())
        plain = self.folder / f"plain-{''.join(map(str, self.masks[0].astype(int)))}.onnx"
        plain.write_bytes(model.SerializeToString())
        return super()._opened(plain.name)


def way(name: str, model: Any, over: str, **how: Any) -> Way:
    """How a model answers; ``over`` is the name of its engine's dense, ``how`` are arguments of its ``answers``."""

    def tokenise(texts: Texts) -> None:
        given = [model.checked(text) for text in texts]
        model.encoded(given) if isinstance(model, OnnxModel) else model.split(given)

    return Way(name, lambda texts, size: model.answers(texts, batch_size=size, **how), over, tokenise)


def both(engine: str, model: Any) -> list[Way]:
    """Dense and the policy on one engine of torch."""
    dense = f"dense, {engine}"
    return [way(dense, model, dense, dense=True), way(f"policy, {engine}", model, dense)]


def attached(policy: SkipPolicy) -> list[Way]:
    """Dense in eager, and the policy on the switchboard, batches as they come."""
    model = sd_gym.load(policy)
    vars(model)["_bank"] = None
    dense, own = both("eager", model)

    def mixed(texts: Texts, size: int | None) -> list[Answer]:
        parts = range(0, len(texts), size or len(texts))
        return [one for start in parts for one in model.answers(texts[start : start + (size or len(texts))])]

    return [dense, own._replace(name="policy, attached", answers=mixed)]


def in_torch(policy: SkipPolicy, *, compiles: bool) -> list[Way]:
    """All ways that run in torch."""
    ways = [*attached(policy), both("bank", sd_gym.load(policy))[1]._replace(dense="dense, eager")]
    if has_bf16(torch.device("cpu")):
        ways += both("bfloat16", sd_gym.load(policy, dtype="bfloat16"))
    if compiles:
        try:
            ways += both("compiled", sd_gym.load(policy, compile=True))
        except ValueError as refused:  # it decides in the pass, or generates texts
            print(refused)
    return ways


def in_onnx(folders: dict[str, Path], texts: Texts, threads: int) -> list[Way]:
    """All ways that run in ONNX Runtime."""
    options, ways = onnxruntime.SessionOptions(), []
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow the ways that come next
    for name, folder in folders.items():
        model, dense = OnnxModel(folder, session_options=options), f"dense, {name}"
        masks, count = np.unique([answer.skip for answer in model(texts)], axis=0, return_counts=True)
        most = int(np.flatnonzero((model.masks == masks[count.argmax()]).all(axis=1))[0])
        for what, number in (("dense", 0), ("one mask", most)):
            ways.append(way(f"{what}, {name}", Plain(folder, number, options), dense, dense=True))
        ways.append(way(f"policy, {name}", model, dense))
    return ways


class Sample(NamedTuple):
    """Texts of an env."""

    instances: list[Instance]
    tested: int  # how many of them are test rows, which come first
    model: TextModel  # which knows what is right

    def quality(self, answers: list[Answer]) -> np.ndarray:
        """Of answers to the test rows, ``[n]``."""
        pairs = zip(answers[: self.tested], self.instances, strict=False)
        right = [(answer.answer, one.target if len(one.references) == 1 else one.references) for answer, one in pairs]
        return np.array([self.model.quality(*pair) for pair in right])


def add_rows(table: Table, ways: list[Way], sample: Sample, size: int | None, rounds: int) -> None:
    """Measure texts in batches of a size, all ways in turn; ``None``: the file, which also has a quality.

    Each text (size 1) or queue is answered in every round. Its time is the median over rounds, and the mean of these is
    shown, as it is for FLOPs. A median over texts would be the time of the most frequent mask.
    """
    rows = np.random.default_rng(0).permutation(len(sample.instances))[: QUEUE * QUEUES]
    parts: Any = rows[:QUEUE, None] if size == 1 else np.array_split(rows, QUEUES)
    if size is None:
        parts = [range(len(sample.instances))]
    asked = [[text_of(sample.instances[row]) for row in part] for part in parts]
    seconds = {way.name: np.zeros((2, rounds, len(asked))) for way in ways}  # to tokenise and answer, and to tokenise
    answers = {way.name: list[Answer]() for way in ways}
    for number in range(-WARM_UP if size else 0, rounds):
        for way in ways:
            for at, texts in enumerate(asked):
                started = time.perf_counter()
                given = way.answers(texts, size)
                answered = time.perf_counter()
                way.tokenise(texts)
                if number >= 0:
                    seconds[way.name][:, number, at] = answered - started, time.perf_counter() - answered
                if number == rounds - 1:
                    answers[way.name] += given
    whole, tokenised = ({name: np.median(both[at], axis=0).mean() for name, both in seconds.items()} for at in (0, 1))
    expected = [one.answer for one in answers[ways[0].name]]
    for way in ways:
        share = statistics.fmean(one.flops_ratio for one in answers[way.name])
        over = whole[way.name] / whole[ways[0].name]
        own = (whole[way.name] - tokenised[way.name]) / (whole[way.dense] - tokenised[way.dense])
        pairs = zip(answers[way.name], expected, strict=True)
        agreed = statistics.fmean(one.answer == other for one, other in pairs)
        shown = [f"{share:.1%}", f"{over:.1%}", f"{own:.1%}", f"{share / own:.2f}", f"{agreed:.1%}"]
        if size is None:
            quality, quality_ref = sample.quality(answers[way.name]), sample.quality(answers[ways[0].name])
            difference, (low, high) = quality - quality_ref, difference_interval(quality, quality_ref)
            shown.append(f"{100 * difference.mean():+.2f} ({100 * low:+.2f} to {100 * high:+.2f})")
        table.add_row(str(size or len(asked[0])), way.name, f"{1000 * whole[way.name] / len(asked[0]):.2f} ms", *shown)
    table.add_section()


def text_of(instance: Instance) -> Any:
    """What a user passes."""
    return instance.source if instance.source_pair is None else (instance.source, instance.source_pair)


def random_texts(texts: Texts) -> Texts:
    """As many of random words: some of one word, some that are cut."""
    random = np.random.default_rng(0)
    words = np.array(sorted({word for text in texts for word in np.ravel(text)[0].split()}))

    def text() -> str:
        return " ".join(random.choice(words, random.integers(1, 200)))

    return [text() if isinstance(one, str) else tuple(text() for _ in one) for one in texts]


def equality(policy: SkipPolicy, folder: Path, texts: Texts) -> str:
    """In how many texts an export equals ``sd_gym.load``, and how far its logits are off."""
    model, graphs = sd_gym.load(policy), sd_gym.onnx.load(folder)
    wanted, answers, off = model.answers(texts), graphs(texts), 0.0
    lines = [f"ONNX and sd_gym.load, on {len(texts):,} texts"]
    for name in ("answer", "skip", "went_on"):
        pairs = ((getattr(one, name), getattr(other, name)) for one, other in zip(wanted, answers, strict=True))
        lines.append(f"{sum(np.array_equal(*pair) for pair in pairs):,} have the same {name}")
    masks = np.array([one.skip for one in answers])
    for number, plain in enumerate(sd_gym.bank(model.model, graphs.masks)):
        own = np.flatnonzero((masks == graphs.masks[number]).all(axis=1))
        for rows in np.split(own, range(32, len(own), 32)) if len(own) else ():
            batch = graphs.batch(graphs.encoded([graphs.checked(texts[row]) for row in rows]))
            batch = {name: batch[name] for name in model.tokenizer.model_input_names}
            with torch.inference_mode():
                output = plain(**{name: torch.from_numpy(values) for name, values in batch.items()})
            spans = "start_logits" in output
            logits = torch.stack([output.start_logits, output.end_logits], dim=1) if spans else output.logits
            off = max(off, float(np.abs(graphs.run(number, batch)[0] - logits.numpy()).max()))
    return ", ".join([*lines, f"logits differ by at most {off:.1e}"])


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of few masks, of an encoder that classifies, scores or extracts")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5, help="times that each text or queue is answered")
    parser.add_argument("--texts", type=int, default=2000, help="texts of the file, which is answered twice")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    compiles = {"action": argparse.BooleanOptionalAction, "default": shutil.which("c++") is not None}
    parser.add_argument("--compile", **compiles, help="compile where that is possible (needs a C++ compiler)")
    arguments = parser.parse_args()
    policy = SkipPolicy.from_pretrained(arguments.run)
    env = policy.card["env"]
    core = shared_core(make_config(env, env["id"]))
    test = core.split("test").instances
    instances = list(islice(chain(test, core.split("train").instances), arguments.texts))
    sample = Sample(instances, len(test), sd_gym.load(policy))
    texts = [text_of(one) for one in instances]
    console = Console(width=max(130, Console().width))
    with TemporaryDirectory() as folder:
        folders = {name: Path(folder, name) for name in ("ONNX", "ONNX int8")}
        try:
            for name, place in folders.items():
                sd_gym.export(policy, place, masks=64, int8=name.endswith("int8"))
        except ValueError as refused:  # an encoder-decoder, for example
            console.print(refused)
            folders = {}
        ways = in_torch(policy, compiles=arguments.compile)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            table = Table(title=f"{arguments.run.name}, {threads} thread(s)")
            for column in ("rows", "who answers", "a text", *COLUMNS):
                table.add_column(column, justify="left" if column == "who answers" else "right")
            every = [*ways, *in_onnx(folders, texts, threads)]
            for size in arguments.batch_sizes:
                add_rows(table, every, sample, size, arguments.rounds)
            add_rows(table, every, sample, None, 2)
            console.print(table)
        if folders:
            console.print(equality(policy, folders["ONNX"], [*texts, *random_texts(texts)]))


if __name__ == "__main__":
    main()
