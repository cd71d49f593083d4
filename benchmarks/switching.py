"""Does the clock show what the FLOPs promise? Time ratio beside FLOPs ratio, dense timed in the same run.

    python benchmarks/switching.py                                                 # the bundled summarizer
    python benchmarks/switching.py --backbone runs/minilm-sst2 --dataset DATA     # a prepared classifier
    python benchmarks/switching.py --architectures mbart t5 llama bert            # random weights, width 512
    python benchmarks/switching.py --architectures all --csv switching.csv        # hours
    python benchmarks/switching.py --architectures all --layers 4 --pairs 3 --keep-rates 1.0 0.8 0.6 0.4 few

promise kept = FLOPs ratio / time ratio; 1 = all of it. Dense and switched runs alternate, and the median over the pairs
is shown. Decisions are random at several keep rates; "few" are as a trained policy makes them: a handful of
different decisions, at a keep rate of one half, some taken much more often than others. Random weights are timed in
three phases: reading the input (prefill), one teacher-forced pass, and ``generate()`` over a key-value cache (decode).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import sd_gym  # noqa: F401  (registers the ids)
from sd_gym.switch import FlopsModel, Switchboard, supported_architectures
from sd_gym.switch.architectures import architecture_of

KEEP_RATES = [1.0, 0.8, 0.6, 0.4, 0.2, "few"]
WARM_UP = 2
SOURCE, TARGET = 64, 24  # tokens


def decisions(random: np.random.Generator, batch: int, switches: int, keep_rate: float | str) -> NDArray:
    """Random skip vectors ``[batch, switches]``; "few": each row takes one of eight, the first ones more often."""
    if keep_rate != "few":
        return (random.random((batch, switches)) >= keep_rate).astype(np.int64)
    weights = 0.5 ** np.arange(1, 9)
    patterns = np.random.default_rng(1).random((8, switches)) >= 0.5
    return patterns[random.choice(8, size=batch, p=weights / weights.sum())].astype(np.int64)


def compare(run: Callable[[], object], board: Switchboard, skip: NDArray) -> float:
    """Seconds of a run under decisions over seconds of the dense one."""
    started = time.perf_counter()
    run()
    middle = time.perf_counter()
    with board.decide(skip):
        run()
    return (time.perf_counter() - middle) / (middle - started)


def used(costs: tuple[NDArray, NDArray], skip: NDArray | int = 0) -> float:
    """FLOPs of rows under decisions, from costs ``(always, switched)``."""
    always, switched = costs
    return float((always + (switched * (1 - skip)).sum(axis=1)).sum())


# --- prepared backbones -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_backbone(core, keep_rate: float | str, batch_size: int, pairs: int) -> tuple[float, float]:
    """(FLOPs ratio, time ratio) of random decisions on random batches of the test split."""
    split, backbone = core.split("test"), core.backbone
    random = np.random.default_rng(0)
    ratios, flops, dense_flops = [], 0.0, 0.0
    for _ in range(pairs + WARM_UP):
        rows = random.integers(len(split), size=batch_size)
        inputs = split.passes.inputs(rows)
        skip = decisions(random, batch_size, core.n_switches, keep_rate)
        ratios.append(compare(lambda inputs=inputs: backbone.logits(inputs), backbone.board, skip))
        # Every row is computed at the batch's padded length, dense and switched alike.
        source, target = (np.full(batch_size, inputs[name].shape[-1]) for name in ("input_ids", "labels"))
        costs = backbone.flops.costs(*backbone.head.lengths(source, target, source))
        flops += used(costs, skip)
        dense_flops += used(costs)
    return flops / dense_flops, statistics.median(ratios[WARM_UP:])


def backbone_table(arguments: argparse.Namespace) -> Table:
    """One prepared backbone at one batch size."""
    env_id, settings = "SD/Summarization-Mini-v0", {"train_size": 500, "test_size": 1000}
    if arguments.backbone:
        env_id = "SD/Classification-Custom-v0"
        settings = {"backbone": arguments.backbone, "dataset": arguments.dataset, "train_size": 500}
    core = gym.make(env_id, **settings).unwrapped.core
    batch_size = arguments.batch_sizes[-1]
    table = Table(title=f"{arguments.backbone or env_id}, batch {batch_size}")
    for column in ("keep rate", "FLOPs ratio", "time ratio", "promise kept"):
        table.add_column(column, justify="right")
    for keep_rate in arguments.keep_rates:
        flops, clock = measure_backbone(core, keep_rate, batch_size, arguments.pairs)
        table.add_row(str(keep_rate), f"{flops:.3f}", f"{clock:.3f}", f"{flops / clock:.2f}")
    return table


# --- architectures with random weights ---------------------------------------------------------------------------


def make_model(architecture: str, width: int, layers: int) -> PreTrainedModel:
    """A model of an architecture with random weights and a vocabulary that is small beside its layers."""
    heads = width // 64
    sizes = {
        **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), width),
        **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers"), layers),
        **dict.fromkeys(("n_layer", "n_layers"), layers),
        **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), heads),
        **dict.fromkeys(("num_heads", "n_head", "n_heads"), heads),
        **dict.fromkeys(("head_dim", "d_kv"), 64),
        **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"), 4 * width),
        **{"num_key_value_heads": max(1, heads // 2), "max_position_embeddings": 512, "vocab_size": 1000},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    known = AutoConfig.for_model(architecture)
    sizes = {key: value for key, value in sizes.items() if hasattr(known, key)} | {"decoder_start_token_id": 0}
    config = AutoConfig.for_model(architecture, **sizes)
    stacks = architecture_of(config.model_type)
    family = (
        AutoModelForSeq2SeqLM
        if len(stacks.stacks) > 1
        else AutoModelForCausalLM
        if stacks.causal
        else AutoModelForSequenceClassification
    )
    return family.from_config(config).eval()


def phases(board: Switchboard, batch: int) -> dict[str, tuple[Callable[[], object], tuple[NDArray, NDArray]]]:
    """What is timed of a model, and its FLOPs ``(always, switched)``, by phase."""
    model, flops = board.model, FlopsModel(board)
    ids = torch.randint(3, 1000, (batch, SOURCE))
    mask = torch.ones_like(ids)
    target = torch.randint(3, 1000, (batch, TARGET))
    source, generated = np.full(batch, SOURCE), np.full(batch, TARGET)

    def generate() -> object:
        length = {"max_new_tokens": TARGET, "min_new_tokens": TARGET}
        return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, **length)

    if len(board.architecture.stacks) > 1:
        encoder, costs = model.get_encoder(), flops.costs(source, generated)
        reads_input = np.array([switch.reads_input for switch in board.switches])
        return {
            "prefill": (
                lambda: encoder(input_ids=ids, attention_mask=mask),
                (np.zeros_like(costs[0]), costs[1] * reads_input),
            ),
            "teacher-forced": (
                lambda: model(input_ids=ids, attention_mask=mask, decoder_input_ids=target, use_cache=False),
                costs,
            ),
            "decode": (generate, costs),
        }
    if board.architecture.causal:
        both, length = torch.cat([ids, target], dim=1), source + generated
        return {
            "prefill": (lambda: model(input_ids=ids, attention_mask=mask, use_cache=True), flops.costs(source)),
            "teacher-forced": (lambda: model(input_ids=both, use_cache=False), flops.costs(length)),
            "decode": (generate, flops.costs(length)),
        }
    return {"prefill": (lambda: model(input_ids=ids, attention_mask=mask), flops.costs(source))}


@torch.inference_mode()
def measure_architecture(architecture: str, arguments: argparse.Namespace) -> list[dict[str, str | int | float]]:
    """FLOPs ratio, time ratio and their quotient for every phase, batch size and keep rate."""
    model, rows = make_model(architecture, arguments.width, arguments.layers), []
    board = Switchboard(model)
    for batch in arguments.batch_sizes:
        for phase, (run, costs) in phases(board, batch).items():
            for _ in range(WARM_UP):
                run()
            for keep_rate in arguments.keep_rates:
                random, ratios, flops = np.random.default_rng(0), [], []
                for _ in range(arguments.pairs):
                    skip = decisions(random, batch, costs[1].shape[1], keep_rate)
                    ratios.append(compare(run, board, skip))
                    flops.append(used(costs, skip) / used(costs))
                share = statistics.fmean(flops)
                # The mean, as the FLOPs are those of all decisions; at batch 1 they differ from pair to pair.
                clock = statistics.median(ratios) if batch > 1 else statistics.fmean(ratios)
                rows.append(
                    {
                        "architecture": architecture,
                        "phase": phase,
                        "batch": batch,
                        "keep rate": keep_rate,
                        "FLOPs ratio": round(share, 4),
                        "time ratio": round(clock, 4),
                        "promise kept": round(share / clock, 4),
                    }
                )
    return rows


def table_of(title: str, groups: list[str], rows: list[dict[str, str | int | float]]) -> Table:
    """Promise kept: a row for each of the ``groups``, a column for each keep rate; of several rows the median."""
    table, rates = Table(title=title), list(dict.fromkeys(row["keep rate"] for row in rows))
    for column in (*groups, *map(str, rates)):
        table.add_column(column, justify="right")
    kept: dict[tuple, list[float]] = {}
    for row in rows:
        kept.setdefault((*(row[group] for group in groups), row["keep rate"]), []).append(row["promise kept"])
    for group in dict.fromkeys(key[:-1] for key in kept):
        table.add_row(*map(str, group), *(cell(kept[*group, rate]) for rate in rates))
    return table


def cell(kept: list[float]) -> str:
    """A figure, or the median of several, with the lowest and the highest."""
    return f"{statistics.median(kept):.2f}" + (f" ({min(kept):.2f} to {max(kept):.2f})" if len(kept) > 1 else "")


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", help="folder of a prepared classifier; without it, the bundled summarizer")
    parser.add_argument("--dataset", help="its data set: JSONL file or folder")
    parser.add_argument("--architectures", nargs="+", help="model types to time with random weights, or 'all'")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="a backbone takes the last one")
    parser.add_argument("--pairs", type=int, default=20, help="timed pairs of a dense and a switched run")
    parser.add_argument(
        "--keep-rates", type=lambda rate: rate if rate == "few" else float(rate), nargs="+", default=KEEP_RATES
    )
    parser.add_argument("--csv", type=Path, help="write every figure of the architectures to this file")
    arguments = parser.parse_args()
    if arguments.architectures is None:
        Console().print(backbone_table(arguments))
        return
    names = supported_architectures() if arguments.architectures == ["all"] else arguments.architectures
    rows = [row for name in track(names, "timing") for row in measure_architecture(name, arguments)]
    title = "promise kept: FLOPs ratio / time ratio"
    Console().print(table_of(title, ["architecture", "phase", "batch"], rows))
    if len(names) > 1:
        title = "over the architectures: median (lowest to highest)"
        by_phase = sorted(rows, key=lambda row: (row["phase"], row["batch"]), reverse=True)
        Console().print(table_of(title, ["phase", "batch"], by_phase))
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
