"""Pictures of a run, and of the fronts of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sd_gym.agents.report.panels import skip_rates
from sd_gym.agents.report.style import COLOURS, INK, LOST, figure, looks, style, write_png
from sd_gym.agents.runs.fronts import LEAST, EnvFronts, flops_at_loss


def plot_run(result: dict[str, Any], switches: list[str], file: Path) -> None:
    """Quality and FLOPs over steps, and the skip rate of each switch against difficulty, as one PNG."""
    with style():
        made = figure(max(5.0, 1.5 + 0.16 * len(switches)), width=10)
        left, right = made.subfigures(1, 2, width_ratios=[1, 1])
        quality, flops = left.subplots(2, 1, sharex=True)
        _plot_history(quality, flops, result)
        rates = right.subplots()
        skip_rates(rates, result["by_difficulty"], switches)
        rates.set_title("Skip rate of each switch, test split")
        write_png(made, file)


def plot_skip_rates(levels: list[dict[str, Any]], switches: list[str]) -> Figure:
    """The skip rate of each switch against difficulty."""
    with style():
        made = figure(1.4 + 0.16 * len(switches))
        skip_rates(made.subplots(), levels, switches)
        return made


def plot_fronts(fronts: list[EnvFronts], file: Path) -> None:
    """FLOPs at each loss from a tenth of epsilon to all of it, a panel an env; bands span the runs of an agent."""
    learned = sorted({name for one in fronts for name in one.learned})
    look_of = looks(learned, [name for one in fronts for name in one.controls])
    with style():
        made = figure(4.5, width=4.3 * len(fronts) + 0.4)
        panels = made.subplots(1, len(fronts), squeeze=False, sharex=True, sharey=True)[0]
        for axes, one in zip(panels, fronts, strict=True):
            shares = np.linspace(LEAST, 1, 19)
            for name, runs in [
                *((name, [front]) for name, front in one.controls.items()),
                *sorted(one.learned.items()),
            ]:
                flops = 100 * np.array([[flops_at_loss(run, share * one.epsilon) for share in shares] for run in runs])
                label = name if name in one.controls else f"{name} ({len(runs)})"
                look = look_of[name]
                axes.plot(100 * shares, flops.mean(axis=0), **look._asdict(), markevery=3, label=label)
                axes.fill_between(100 * shares, flops.min(axis=0), flops.max(axis=0), color=look.color, alpha=0.15)
            axes.set(title=one.env, xlabel=f"quality lost, % of the {100 * one.epsilon:g} points that may be lost")
        known = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        made.legend(known.values(), known.keys(), loc="outside lower center", ncols=3)
        panels[0].set(ylabel="FLOPs, % of dense", ylim=(0, None))
        write_png(made, file)


def _plot_history(quality: Axes, flops: Axes, result: dict[str, Any]) -> None:
    """What validation has seen, and on the right what the test split says."""
    history = result["history"]
    steps = [entry["step"] for entry in history]
    marks = {"marker": "o", "color": COLOURS[0]}
    quality.axhline(0, color=INK, linewidth=0.8, label="dense")
    epsilon = result.get("epsilon")
    if epsilon is not None:
        quality.axhline(-100 * epsilon, color=LOST, linestyle="--", linewidth=1, label="as much as may be lost")
    lost = [100 * (entry["quality"] - entry["quality_ref"]) for entry in history]
    quality.plot(steps, lost, **marks, label="validation, most probable decisions")
    flops.plot(steps, [100 * entry["flops_ratio"] for entry in history], **marks)
    end = max(steps, default=0)
    test = {"marker": "*", "markersize": 12, "color": COLOURS[2], "linestyle": "none"}
    quality.plot(end, 100 * result["quality_difference"], **test, label="test, selected policy")
    flops.plot(end, 100 * result["flops_ratio"], **test)
    quality.set(ylabel="quality against dense, points", title="Quality and FLOPs")
    quality.legend(loc="best")
    flops.set(xlabel="decisions learned from", ylabel="FLOPs, % of dense", ylim=(0, 104))
