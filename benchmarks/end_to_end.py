"""What the clock shows of a trained policy, from tokenised inputs to outputs, deciding included; dense in the same run.

    sd-gym train SD/Summarization-Mini-v0 --output runs/mini
    python benchmarks/end_to_end.py runs/mini runs/reviews --codebook 8 4

For each run, and with ``--codebook`` for what ``sd-gym reduce`` makes of it (kept beside it): the attached model on
batches of the env's test split, one pass (teacher-forced where it generates) and ``generate()`` (both make as many
tokens as the longest reference has), and its texts (and then the training split's, where it has too few) in bulk, as
``sd-gym run`` answers a file: as many rows at a time as it likes, and eight. Dense, the untouched model, takes turns
with it on the same inputs; in bulk its rows are grouped by length, as well, and tokenising and writing count for both.

Times are over dense, by the wall clock and by the time of the processor, which other work on the machine disturbs less:
the median over batches; at batch 1 the mean, since decisions differ from input to input. Promise kept = FLOPs / time; 1
= all of it. "agree" is how many rows of a batch share the commonest decision.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sd_gym.agents.experiment.reduction import reduce

import sd_gym
from sd_gym.backbones import load_backbone
from sd_gym.envs.config import make_config
from sd_gym.envs.protocols import Core
from sd_gym.envs.shared import shared_core
from sd_gym.inference.bulk import run_file
from sd_gym.inference.texts import Answer, SkippingModel
from sd_gym.policy.artefact import SkipPolicy

WARM_UP = 2
BULK_ROUNDS = 3


class Times(NamedTuple):
    """Seconds, or ratios of them."""

    wall: float
    processor: float

    def over(self, dense: Times) -> Times:
        """Ratios."""
        return Times(self.wall / dense.wall, self.processor / dense.processor)


def timed(run: Callable[..., object], *arguments: object) -> Times:
    """How long it takes."""
    wall, processor = time.perf_counter(), time.process_time()
    run(*arguments)
    return Times(time.perf_counter() - wall, time.process_time() - processor)


def middle(ratios: Sequence[Times], average: Callable[[Sequence[float]], float]) -> Times:
    """The average ratio by each clock."""
    return Times(*(average(clock) for clock in zip(*ratios, strict=True)))


def shown(flops: float, clock: Times, agree: float, tokens: Sequence[float] | None = None) -> list[str]:
    """The cells of a row; ``tokens``: those generated per second, with the policy and densely."""
    kept = [cell for time in clock for cell in (f"{time:.1%}", f"{flops / time:.2f}")]
    return [f"{flops:.1%}", *kept, f"{agree:.0%}", "" if tokens is None else f"{tokens[0]:.0f} ({tokens[1]:.0f})"]


class Dense:
    """A model on which everything runs, for ``run_file``."""

    def __init__(self, model: SkippingModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def answers(self, inputs: list[list[str]], *, dense: bool, batch_size: int | None) -> list[Answer]:
        """Dense answers, whether asked for or not."""
        return self._model.answers(inputs, dense=True, batch_size=batch_size)


@torch.inference_mode()
def batches(
    model: SkippingModel, dense: torch.nn.Module, core: Core, size: int, pairs: int, *, generates: bool
) -> list[str]:
    """The row of a batch size, of one pass or of ``generate()``."""
    split, random, head = core.split("test"), np.random.default_rng(0), core.backbone.head
    flops, times, agree, own = [], [], [], model.own_flops(split)
    seconds, written = np.zeros(2), 0  # with the policy and densely; tokens

    def call(one: torch.nn.Module, batch: dict) -> object:
        if not generates:
            return head.forward(Switched(one), batch)
        given = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
        tokens = batch["labels"].shape[1]
        return one.generate(**given, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)

    for number in range(pairs + WARM_UP):
        rows = random.integers(len(split), size=size)
        batch = split.passes.inputs(rows)
        of_dense, switched = timed(call, dense, batch), timed(call, model.model, batch)
        if number < WARM_UP:
            continue
        times.append(switched.over(of_dense))
        seconds += switched.wall, of_dense.wall
        written += batch["labels"].numel()
        deciding = own[rows] / split.costs.dense_flops(rows)
        flops.append(float((model.model.decisions.flops_ratio + deciding).mean()))
        _, same = np.unique(model.model.decisions.skip, axis=0, return_counts=True)
        agree.append(same.max() / size)
    clock = middle(times, statistics.fmean if size == 1 else statistics.median)
    tokens = (written / seconds).tolist() if generates else None
    return shown(statistics.fmean(flops), clock, statistics.fmean(agree), tokens)


class Switched(NamedTuple):
    """What ``Head.forward`` asks a switchboard for."""

    model: torch.nn.Module


def in_bulk(model: SkippingModel, core: Core, count: int, size: int | None) -> list[str]:
    """The row of a file with so many texts, the test split's first, ``size`` at a time."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        source, answers = folder / "texts.jsonl", folder / "answers.jsonl"
        instances = chain(core.split("test").instances, core.split("train").instances)
        texts = [(one.source, one.source_pair) for one in islice(instances, count)]
        rows = [dict(zip(model.fields, (text for text in pair if text is not None), strict=False)) for pair in texts]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model([list(row.values()) for row in rows[:64]])

        def answer(one: SkippingModel | Dense) -> None:
            answers.unlink(missing_ok=True)
            run_file(one, source, answers, batch_size=size)

        times = []
        for _ in range(BULK_ROUNDS):
            of_dense = timed(answer, Dense(model))
            times.append(timed(answer, model).over(of_dense))
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
    decided = [json.dumps([line[key] for key in ("skip", "token_level")]) for line in lines]
    commonest = max(decided.count(one) for one in set(decided)) / len(decided)
    flops = statistics.fmean(line["flops_ratio"] for line in lines)
    return shown(flops, middle(times, statistics.median), commonest)


def reduced(run: Path, codebook: int) -> Path:
    """What ``sd-gym reduce`` makes of a run, made once."""
    folder = run.with_name(f"{run.name}-codebook-{codebook}")
    if not folder.exists():
        reduce(run, codebook, folder)
    return folder


def core_of(run: Path) -> Core:
    """Of the env that a run's policy is for; of a run on a table, that which the table is of."""
    env = SkipPolicy.from_pretrained(run).card["env"]
    return shared_core(make_config(env, env["id"]))


def add_rows(table: Table, run: Path, arguments: argparse.Namespace) -> None:
    """Measure a run."""
    core = core_of(run)
    dense = copy.deepcopy(load_backbone(core.config.backbone.name, core.config.backbone.device).model)
    dense._switchboard.remove()
    model = sd_gym.load(run)
    # A policy that judges generated texts has no single pass.
    has_pass = core.backbone.head.judges_passes or not model.policy.has_answer_stage
    for generates in [False] * has_pass + [True] * core.backbone.model.can_generate():
        for size in arguments.batch_sizes:
            cells = batches(model, dense, core, size, arguments.pairs, generates=generates)
            table.add_row(run.name, "generate()" if generates else "one pass", str(size), *cells)
    count = min(arguments.texts, len(core.split("test")) + len(core.split("train")))
    if count:
        table.add_row(run.name, "sd-gym run", f"{count:,}", *in_bulk(model, core, count, None))
        eight = in_bulk(model, core, count, 8)
        table.add_row(run.name, "... --batch-size 8", f"{count:,}", *eight, end_section=True)
    sd_gym.detach(model.model)


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that sd-gym train or reduce wrote")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=40, help="timed pairs of a dense and a decided batch")
    parser.add_argument("--texts", type=int, default=2000, help="texts of the file, at most; 0: none")
    parser.add_argument(
        "--codebook", type=int, nargs="+", default=[], help="of each run also what so many decisions make of it"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(title=f"End to end, over dense, {arguments.threads} thread(s)")
    clocks = "time", "kept", "processor time", "kept"
    for column in ("run", "what", "rows", "FLOPs", *clocks, "agree", "tokens/s (dense)"):
        table.add_column(column, justify="left" if column in ("run", "what") else "right")
    for run in arguments.runs:
        add_rows(table, run, arguments)
        for codebook in arguments.codebook:
            add_rows(table, reduced(run, codebook), arguments)
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
