"""What the env costs over its backbone: steps a second of the vector env, of single envs, and of the bare backbone.

    python benchmarks/env_speed.py

All three run the same instances under decisions drawn alike, none of which was scored before; the dense scores are
known from an earlier walk, as they are in training after the first epoch. The rounds alternate, medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import sd_gym  # noqa: F401  (registers the ids)
from sd_gym.switch import passes

NUM_ENVS = 64


def bare(core, rows: np.ndarray, skip: np.ndarray) -> float:
    """Seconds of the backbone alone on the passes that the env would make, inputs and plans ready."""
    split, backbone = core.split("train"), core.backbone
    seconds = 0.0
    for picked in passes(skip, split.encoded.source_length[rows], backbone.model.config.hidden_size):
        inputs = split.passes.inputs(rows[picked])
        with torch.inference_mode(), backbone.board.decide(skip[picked]):
            started = time.perf_counter()
            backbone.logits(inputs)
            seconds += time.perf_counter() - started
    return seconds


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="SD/Summarization-Mini-v0")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skip-rate", type=float, default=0.5)
    arguments = parser.parse_args()
    vector = gym.make_vec(arguments.env, num_envs=NUM_ENVS, train_size=2000).unwrapped
    singles = [gym.make(arguments.env, train_size=2000).unwrapped for _ in range(NUM_ENVS)]
    core = vector.core
    split = core.split("train")
    core.score(split, np.arange(len(split)), np.zeros((len(split), len(core.nvec)), dtype=np.int64))
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"bare backbone": [], "make_vec": [], "loop over single envs": []}
    for _ in range(arguments.rounds + 2):
        rows = random.integers(len(split), size=NUM_ENVS)
        ids = [split.instances[row].id for row in rows]
        actions = np.zeros((3, NUM_ENVS, len(core.nvec)), dtype=np.int64)
        actions[:, :, :-1] = random.random((3, NUM_ENVS, core.n_switches)) < arguments.skip_rate
        seconds["bare backbone"].append(bare(core, rows, actions[0, :, :-1]))
        vector.reset(options={"instance": ids})
        started = time.perf_counter()
        vector.step(actions[1])
        seconds["make_vec"].append(time.perf_counter() - started)
        for env, identity in zip(singles, ids, strict=True):
            env.reset(options={"instance": identity})
        started = time.perf_counter()
        for env, action in zip(singles, actions[2], strict=True):
            env.step(action)
        seconds["loop over single envs"].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    table = Table(title=f"{arguments.env}, {NUM_ENVS} instances a step, skip rate {arguments.skip_rate}")
    for column in ("", "steps a second", "time over the bare backbone"):
        table.add_column(column, justify="right")
    for name, median in medians.items():
        table.add_row(name, f"{NUM_ENVS / median:.0f}", f"{median / medians['bare backbone']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
