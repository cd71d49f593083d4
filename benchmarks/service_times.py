"""How long a group of n requests takes at each operating point, fitted as a*n + b: the points of a serving env.

    export OMP_NUM_THREADS=1
    python benchmarks/service_times.py masks SD/Serving-TREC-Table-v0 --backbone minilm-trec --tokens 16
    python benchmarks/service_times.py policy runs/agnews-8 --served agnews-onnx --input texts.jsonl > mine.yaml

``masks`` prints the points of a YAML file in ``envs_configs/serving/``. ``policy`` prints the whole YAML file of an env
whose points are those of a policy, deciding included. The seconds are those of one thread's own time, which other
processes on the machine hardly change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import sd_gym
from sd_gym.backbones.load import load_own_backbone
from sd_gym.envs.serving.config import serving_config
from sd_gym.envs.table_files import table_folder
from sd_gym.serving.engine import Asked, BlockingEngine
from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.server import service

SIZES = (1, 2, 4, 8, 16, 32)
RUNS = 12


def main() -> None:
    """Measure, and print the points; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    of_masks = kinds.add_parser("masks", help="the masks of a serving env")
    of_masks.add_argument("env", help="id of the env")
    of_masks.add_argument("--backbone", required=True, help="name or folder of the model that the table is of")
    of_masks.add_argument("--tokens", type=int, default=16, help="length of a request")
    of_masks.set_defaults(function=print_masks)
    of_policy = kinds.add_parser("policy", help="the operating points of a policy")
    of_policy.add_argument("run", type=Path, help="a run on a table, of few masks")
    of_policy.add_argument("--served", help="what sd-gym export wrote of it, if that is what the server runs")
    of_policy.add_argument("--input", type=Path, required=True, help="JSON lines with the task's fields")
    of_policy.add_argument("--allow-loss", type=float, help="as of sd-gym serve")
    of_policy.add_argument("--points", type=int, default=8, help="most operating points, evenly spaced by FLOPs")
    of_policy.add_argument("--id", default="Mine/Serving-v0", help="of the env")
    of_policy.set_defaults(function=print_policy)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.function(args)


def print_masks(args: argparse.Namespace) -> None:
    """The points of an env whose points are masks."""
    model = load_own_backbone(args.backbone, "cpu").model
    masks = [list(point.mask or ()) for point in serving_config(args.env, {}).points]
    for mask, model_of_mask in zip(masks, sd_gym.bank(model, masks), strict=True):
        per_request, per_group = fitted(least_seconds(model_of_mask, args.tokens))
        print(f"  - {{mask: {mask}, per_request: {per_request:.6f}, per_group: {per_group:.6f}}}")


def print_policy(args: argparse.Namespace) -> None:
    """The YAML file of an env whose points are those of a policy."""
    with args.input.open() as lines:
        texts = [json.loads(line) for line in itertools.islice(filter(str.strip, lines), 1000)]
    served = service(args.served or args.run, Limits(), RequestLimits(), allow_loss=args.allow_loss, threads=1)
    described = json.loads((args.run / "config.json").read_text())
    if described["env_config"]["table"] is None:
        raise SystemExit(f"{args.run} was not trained on a table, whose outcomes the queue needs: sd-gym tabulate")
    table = table_folder(described["env_config"]["table"]).resolve()
    if not (table / "table.json").exists():
        raise SystemExit(f"the table of {args.run} is not at {table}; call this from the folder where it was trained")
    print(
        f"# {args.id}: a queue in front of a server of the policy in {args.run.resolve().name}, simulated on a table."
    )
    print(f"id: {args.id}\ntable: {table}\npolicy: {args.run.resolve()}\npoints:")
    for number in evenly_spaced([point.flops_ratio for point in served.points.points], args.points)[::-1]:
        point = served.points.points[number]
        per_request, per_group = fitted(median_seconds(served.engine, texts, number))
        print(f"  - {{margin: {point.margin!r}, per_request: {per_request:.6f}, per_group: {per_group:.6f}}}")


def evenly_spaced(flops: Sequence[float], most: int) -> list[int]:
    """Indices of at most ``most`` ascending FLOPs ratios, with the first and the last one."""
    wanted = np.linspace(flops[0], flops[-1], most)[:-1]
    nearest = np.abs(np.array(flops) - wanted[:, None]).argmin(axis=1)
    return np.unique([*nearest, len(flops) - 1]).tolist()


@torch.inference_mode()
def least_seconds(model: PreTrainedModel, tokens: int) -> NDArray:
    """The least time of a group of each of ``SIZES``, in seconds of this thread."""

    def run(size: int) -> None:
        ids = torch.randint(1000, model.config.vocab_size, (size, tokens))
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    return timed(run).min(axis=0)


def median_seconds(engine: BlockingEngine, texts: list[object], point: int) -> NDArray:
    """The median time of groups of random texts, of each of ``SIZES``, in seconds of this thread."""
    random = np.random.default_rng(0)
    asked = [Asked(engine.checked(text), point) for text in texts]

    def run(size: int) -> None:
        rows = engine.prepare([asked[number] for number in random.integers(len(asked), size=size)])
        for mask in {row.masks[point] for row in rows}:
            engine.run([row for row in rows if row.masks[point] == mask], point)

    run(SIZES[-1])  # warms it up
    return np.median(timed(run), axis=0)


def timed(run: Callable[[int], None]) -> NDArray:
    """Seconds of this thread, ``[RUNS, SIZES]``."""
    seconds = np.zeros((RUNS, len(SIZES)))
    for times in seconds:
        for number, size in enumerate(SIZES):
            started = time.thread_time()
            run(size)
            times[number] = time.thread_time() - started
    return seconds


def fitted(seconds: NDArray) -> tuple[float, float]:
    """``a`` and ``b`` of ``a*n + b`` by least squares of the relative errors."""
    terms = np.stack([np.array(SIZES), np.ones(len(SIZES))], axis=1) / seconds[:, None]
    (per_request, per_group), *_ = np.linalg.lstsq(terms, np.ones(len(SIZES)), rcond=None)
    return float(per_request), max(0.0, float(per_group))


if __name__ == "__main__":
    main()
