"""How long a group of n requests takes under each operating point of a serving env, fitted as a*n + b.

    OMP_NUM_THREADS=1 python benchmarks/service_times.py SD/Serving-TREC-Table-v0 --backbone minilm-trec --tokens 16

It prints the points of a YAML file in ``envs_configs/serving/``. The seconds are those of one thread's own time, which
other processes on the machine hardly change; the least of several runs counts.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import sd_gym
from sd_gym.envs.serving.config import serving_config

SIZES = (1, 2, 4, 8, 16, 32)
RUNS = 12


def main() -> None:
    """Measure, and print the points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="id of a serving env, whose masks are measured")
    parser.add_argument("--backbone", required=True, help="name or folder of the model that the table is of")
    parser.add_argument("--tokens", type=int, default=16, help="length of a request")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(args.backbone, trust_remote_code=False).eval()
    masks = [list(point.mask) for point in serving_config(args.env, {}).points]
    for mask, model_of_mask in zip(masks, sd_gym.bank(model, masks), strict=True):
        per_request, per_group = fitted(least_seconds(model_of_mask, args.tokens))
        print(f"  - {{mask: {mask}, per_request: {per_request:.6f}, per_group: {per_group:.6f}}}")


@torch.inference_mode()
def least_seconds(model: PreTrainedModel, tokens: int) -> NDArray:
    """The least time of a group of each of ``SIZES``, in seconds of this thread."""
    least = np.full(len(SIZES), np.inf)
    for _ in range(RUNS):
        for number, size in enumerate(SIZES):
            ids = torch.randint(1000, model.config.vocab_size, (size, tokens))
            started = time.thread_time()
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            least[number] = min(least[number], time.thread_time() - started)
    return least


def fitted(seconds: NDArray) -> tuple[float, float]:
    """``a`` and ``b`` of ``a*n + b`` by least squares of the relative errors."""
    terms = np.stack([np.array(SIZES), np.ones(len(SIZES))], axis=1) / seconds[:, None]
    (per_request, per_group), *_ = np.linalg.lstsq(terms, np.ones(len(SIZES)), rcond=None)
    return float(per_request), max(0.0, float(per_group))


if __name__ == "__main__":
    main()
