"""What the clock shows of a trained policy, from tokenised inputs to outputs, deciding included; dense in the same run.

    sd-gym train SD/Summarization-Mini-v0 --output runs/mini
    sd-gym reduce runs/mini --codebook 8 --output runs/mini-8
    python benchmarks/end_to_end.py runs/mini runs/mini-8

For each run: the attached model on batches of the env's test split (``generate()`` where it generates) at the batch
sizes, and its texts in bulk, as ``sd-gym run`` answers a file. Dense, the untouched model, takes turns with it
on the same inputs; in bulk its rows are grouped by length, as well. "time" is over dense: the median over batches, at
batch 1 the mean, since decisions differ from input to input. Promise kept = FLOPs / time; 1 = all of it. "agree" is how
many rows of a batch share the commonest decision.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sd_gym.agents.experiment.run import load_run

import sd_gym
from sd_gym.backbones import load_backbone
from sd_gym.inference.bulk import run_file
from sd_gym.inference.texts import SkippingModel

WARM_UP = 2


def seconds(run: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.inference_mode()
def batches(model: SkippingModel, dense: torch.nn.Module, core, size: int, pairs: int) -> list[str]:
    """FLOPs, time, promise kept and agreement at a batch size."""
    split, random, generates = core.split("test"), np.random.default_rng(0), core.backbone.model.can_generate()
    settings = {"max_new_tokens": core.config.backbone.max_target_length, "do_sample": False} if generates else {}
    flops, times, agree = [], [], []
    for number in range(pairs + WARM_UP):
        rows = random.integers(len(split), size=size)
        given = split.passes.inputs(rows)
        given = {key: given[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in given}

        def call(one: torch.nn.Module, given: dict = given) -> object:
            return one.generate(**given, **settings) if generates else one(**given)

        ratio = 1 / seconds(lambda call=call: call(dense)) * seconds(lambda call=call: call(model.model))
        if number < WARM_UP:
            continue
        times.append(ratio)
        own = model.policy.network.flops / split.costs.dense_flops(rows)
        flops.append(float((model.model.decisions.flops_ratio + own).mean()))
        _, same = np.unique(model.model.decisions.skip, axis=0, return_counts=True)
        agree.append(same.max() / size)
    clock = statistics.fmean(times) if size == 1 else statistics.median(times)
    shown = statistics.fmean(flops)
    return [f"{shown:.1%}", f"{clock:.1%}", f"{shown / clock:.2f}", f"{statistics.fmean(agree):.0%}"]


def in_bulk(model: SkippingModel, core, count: int) -> list[str]:
    """FLOPs, time, promise kept and agreement of a file with the test split's first texts."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "texts.jsonl"
        texts = [(one.source, one.source_pair) for one in core.split("test").instances[:count]]
        rows = [dict(zip(model.fields, (text for text in pair if text is not None), strict=False)) for pair in texts]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model([list(row.values()) for row in rows[:64]])
        bulk = run_file(model, source, Path(folder) / "answers.jsonl", compare=True)
        lines = (Path(folder) / "answers.jsonl").read_text().splitlines()
        decided = [json.dumps([json.loads(line)[key] for key in ("skip", "token_level")]) for line in lines]
    flops, clock = float(np.mean(bulk.flops_ratio)), bulk.seconds / bulk.dense_seconds
    commonest = max(decided.count(one) for one in set(decided)) / len(decided)
    return [f"{flops:.1%}", f"{clock:.1%}", f"{flops / clock:.2f}", f"{commonest:.0%}"]


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that sd-gym train or reduce wrote")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=20, help="timed pairs of a dense and a decided batch")
    parser.add_argument("--texts", type=int, default=2000, help="texts of the file, at most")
    arguments = parser.parse_args()
    for run in arguments.runs:
        table = Table(title=f"{run.name}: end to end, over dense")
        for column in ("batch", "FLOPs", "time", "promise kept", "agree"):
            table.add_column(column, justify="right")
        _, core, _ = load_run(run)
        dense = copy.deepcopy(load_backbone(core.config.backbone.name, core.config.backbone.device).model)
        dense._switchboard.remove()
        model = sd_gym.load(run)
        for size in arguments.batch_sizes:
            table.add_row(str(size), *batches(model, dense, core, size, arguments.pairs))
        count = min(arguments.texts, len(core.split("test")))
        table.add_row(f"{count:,} in bulk", *in_bulk(model, core, count))
        sd_gym.detach(model.model)
        Console().print(table)


if __name__ == "__main__":
    main()
