"""How long a report of many runs takes: synthetic run folders, made of one finished run with figures drawn anew.

``python benchmarks/report_speed.py RUN [--runs 1000]``; RUN is any folder that ``sd-gym train`` wrote.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from sd_gym.agents.report.page import write_report

AGENTS = ("ppo", "a2c", "reinforce", "imitation", "static", "random", "early-exit", "oracle", "hash", "dense")
ENVS = ("SD/Classification-Mini-v0", "SD/QuestionAnswering-Mini-v0", "SD/Summarization-Mini-v0", "SD/Other-v0")


def synthetic(run: Path, folder: Path, runs: int) -> list[Path]:
    """So many run folders, over agents, envs and seeds."""
    config, result = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "result"))
    random = np.random.default_rng(0)
    made = []
    for number in range(runs):
        seed, kind = divmod(number, len(AGENTS) * len(ENVS))
        env, agent = ENVS[kind % len(ENVS)], AGENTS[kind // len(ENVS)]
        lost, flops = random.uniform(-0.02, 0.002), random.uniform(0.2, 0.9)
        changed = {"quality_difference": lost, "flops_ratio_with_policy": flops, "quality_kept": bool(lost > -0.006)}
        history = [one | {"flops_ratio": random.uniform(flops, 1)} for one in result["history"]]
        made.append(folder / f"run-{number}")
        made[-1].mkdir()
        described = config | {"env": env, "algo": agent, "seed": seed}
        (made[-1] / "config.json").write_text(json.dumps(described))
        (made[-1] / "result.json").write_text(json.dumps(result | changed | {"history": history}))
        shutil.copy(run / "instances.csv", made[-1])
    return made


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = synthetic(arguments.run, Path(folder), arguments.runs)
        started, used = time.perf_counter(), time.process_time()
        (page,) = write_report(runs, Path(folder) / "report.html")
        elapsed, used = time.perf_counter() - started, time.process_time() - used
        print(f"{len(runs)} runs: {elapsed:.1f} s ({used:.1f} s of CPU), a page of {page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
