"""Pictures of a run, and of the fronts of several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sd_gym.agents.report.fronts import flops_at_loss
from sd_gym.agents.report.savings import LEAST, EnvFronts


def plot_run(result: dict[str, Any], switches: list[str], file: Path) -> None:
    """Quality and FLOPs over steps, and the skip rate of each switch against difficulty, as one PNG."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, rates = figure.subplots(2, 1, height_ratios=[1, 1])
    _plot_history(curves, result["history"])
    _plot_skip_rates(rates, result["by_difficulty"], switches)
    _write(figure, file)


def plot_fronts(fronts: list[EnvFronts], file: Path) -> None:
    """FLOPs at each loss from a tenth of epsilon to all of it, a panel an env; bands span the runs of an agent."""
    figure = Figure(figsize=(5 * len(fronts), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, one in zip(figure.subplots(1, len(fronts), squeeze=False)[0], fronts, strict=True):
        losses = np.linspace(LEAST, 1, 19) * one.epsilon
        for name, runs in [*((name, [front]) for name, front in one.controls.items()), *sorted(one.learned.items())]:
            flops = 100 * np.array([[flops_at_loss(run, loss) for loss in losses] for run in runs])
            style, label = ("--", name) if name in one.controls else ("-", f"{name} ({len(runs)})")
            (line,) = axes.plot(100 * losses, flops.mean(axis=0), style, label=label)
            axes.fill_between(100 * losses, flops.min(axis=0), flops.max(axis=0), color=line.get_color(), alpha=0.15)
        axes.set(title=one.env, xlabel="quality lost, points", ylabel="FLOPs, % of dense")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    _write(figure, file)


def _write(figure: Figure, file: Path) -> None:
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=100)
    os.replace(temporary, file)


def _plot_history(axes: Any, history: list[dict[str, Any]]) -> None:
    steps = [entry["step"] for entry in history]
    axes.plot(steps, [entry["quality"] for entry in history], marker="o", label="quality")
    axes.plot(steps, [entry["quality_ref"] for entry in history], linestyle="--", label="quality, dense")
    axes.plot(steps, [entry["flops_ratio"] for entry in history], marker="s", label="FLOPs ratio")
    axes.set(xlabel="decisions learned from", ylim=(0, 1.03), title="Validation split, most probable decisions")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def _plot_skip_rates(axes: Any, levels: list[dict[str, Any]], switches: list[str]) -> None:
    rates = np.array([level["skip_rate"] for level in levels])
    image = axes.imshow(rates, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(switches)), switches, rotation=90, fontsize=7)
    labels = [f"{level['difficulty']}  (FLOPs {level['flops_ratio']:.0%})" for level in levels]
    axes.set_yticks(range(len(levels)), labels)
    axes.set(ylabel="difficulty", title="Skip rate of each switch, test split")
    axes.figure.colorbar(image, ax=axes, label="skip rate")
