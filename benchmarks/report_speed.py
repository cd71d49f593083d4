"""How long a report of many runs takes: synthetic run folders, made of one finished run with figures drawn anew.

Where there is a Chromium, a page is loaded in it too: the time from its start until all is laid out, and the processor
time of the browser beyond what it takes for an empty page; the least of several times, as much else may run beside.

``python benchmarks/report_speed.py RUN [--runs 1000]``; RUN is any folder that ``sd-gym train`` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from sd_gym.agents.report.page import write_report

AGENTS = ("ppo", "a2c", "reinforce", "imitation", "static", "random", "early-exit", "oracle", "hash", "dense")
ENVS = ("SD/Classification-Mini-v0", "SD/QuestionAnswering-Mini-v0", "SD/Summarization-Mini-v0", "SD/Other-v0")

LOADS = 5  # of a page
# The dump is taken after the event, and asking for the height has everything laid out.
TIMER = """<script>addEventListener("load", () => {
const height = document.documentElement.scrollHeight, count = document.getElementsByTagName("*").length;
document.title = `drawn ${performance.now()} ${count}`; });</script>"""
EMPTY = "<!doctype html><html><head><title>empty</title></head><body></body></html>"


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


def browser() -> str | None:
    """The command of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def loaded(command: str, html: str, folder: Path) -> tuple[float, float, int]:
    """Load a page once: seconds until it is laid out, seconds of processor time, and its elements."""
    page = folder / "loaded.html"
    page.write_text(html.replace("</head>", f"{TIMER}</head>", 1), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}", "--dump-dom"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([command, *options, page.as_uri()], capture_output=True, encoding="utf-8", check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r"<title>drawn ([\d.]+) (\d+)</title>", shown.stdout)
    if found is None:
        raise RuntimeError(f"{command} did not load the page: {shown.stderr[-500:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(found[1]) / 1000, used, int(found[2])


def print_load(command: str, page: Path, folder: Path) -> None:
    """Print how long a page takes to load."""
    text = page.read_text(encoding="utf-8")
    empty = min(loaded(command, EMPTY, folder)[1] for _ in range(LOADS))
    found = [loaded(command, text, folder) for _ in range(LOADS)]
    seconds, used = (min(one[number] for one in found) for number in (0, 1))
    print(f"it loads in {seconds:.2f} s ({used - empty:.2f} s of CPU), {found[0][2]:,} elements")


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
        command = browser()
        if command is None:
            print("no Chromium here: not loaded")
        else:
            print_load(command, page, Path(folder))


if __name__ == "__main__":
    main()
