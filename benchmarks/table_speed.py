"""How fast a table's envs step, and how much memory that takes: python benchmarks/table_speed.py [TABLE].

Without a table, one of random numbers is made: 2,000 instances, 12 switches, all 4,096 decisions.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import gymnasium as gym
import numpy as np

import sd_gym  # noqa: F401  (registers the ids)
from sd_gym.envs.table_files import FORMAT
from sd_gym.files import write_arrays, write_json

SECONDS = 2.0
SWITCHES, INSTANCES, FEATURES, LENGTHS = 12, 2000, 258, 128


def made_up(folder: Path) -> Path:
    """A table of random outcomes."""
    random, masks = np.random.default_rng(0), 2**SWITCHES
    names = [f"encoder.{number // 2}.{('attention', 'feed_forward')[number % 2]}" for number in range(SWITCHES)]
    nothing = np.zeros(INSTANCES, dtype=np.int64)
    arrays = {
        "quality": np.packbits(random.integers(2, size=(INSTANCES, masks)), axis=1),
        "quality_values": np.array([0.0, 1.0]),
        "costs": random.integers(LENGTHS, size=INSTANCES).astype(np.uint8),
        "always": np.ones((LENGTHS, 1), dtype=np.int64),
        "switched": random.integers(10**6, size=(LENGTHS, 1, SWITCHES)),
        "observations": random.normal(size=(INSTANCES, FEATURES)).astype(np.float32),
        **dict.fromkeys(("difficulty", "levels", "source_length"), nothing),
        **dict.fromkeys(("source_cut", "target_cut"), nothing.astype(bool)),
    }
    write_arrays(folder / "train.safetensors", arrays)
    write_json(folder / "train.json", {"ids": [f"train-{row}" for row in range(INSTANCES)], "facts": {}})
    said = {"format": FORMAT, "complete": True, "env": "made up", "nvec": [2] * SWITCHES + [1]}
    said |= {"backbone": {"name": "none", "weights": "", "switches": names}}
    said |= {"observation": {"shape": [FEATURES], "low": -10, "high": 10}}
    said |= {"env_config": {"id": "made up", "task": "classification", "dataset": "none", "backbone": "none"}}
    said |= {"splits": {"train": {"instances": INSTANCES, "identity": {}, "provenance": {}}}}
    write_json(folder / "table.json", said)
    return folder


def measure(table: Path) -> None:
    """Decisions a second of CPU time, on one core, by the number of envs; observations and infos included."""
    print(json.loads((table / "table.json").read_text())["env"])
    env = gym.make("SD/Table-v0", table=str(table))
    actions = [env.action_space.sample() for _ in range(64)]
    env.reset(seed=0)
    steps, started = 0, time.process_time()
    while time.process_time() - started < SECONDS:
        env.step(actions[steps % len(actions)])
        env.reset()
        steps += 1
    print(f"gym.make:   {steps / (time.process_time() - started):10,.0f} steps a second, each with a reset")
    for num_envs in (16, 64, 256, 1024):
        env = gym.make_vec("SD/Table-v0", num_envs=num_envs, table=str(table))
        env.reset(seed=0)
        actions = [env.action_space.sample() for _ in range(8)]
        steps, started = 0, time.process_time()
        while time.process_time() - started < SECONDS:
            env.step(actions[steps % len(actions)])
            steps += 1
        print(f"{num_envs:5} envs: {steps * num_envs / (time.process_time() - started):10,.0f} decisions a second")
    print(f"memory at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    print(f"torch was imported: {'torch' in sys.modules}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as folder:
            measure(made_up(Path(folder)))
