"""The picture of a run (``result.png``), and the skip rates, which TensorBoard and reports show as well."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sd_gym.agents.drawing.style import ALLOWED, COLOURS, INK, SKIP_RATE, figure, flops_limit, style, write_png

FEW = 30  # levels with fewer instances are marked


def plot_run(result: dict[str, Any], switches: list[str], file: Path) -> None:
    """Quality and FLOPs over steps, and the skip rate of each switch against difficulty, as one PNG."""
    with style():
        picture = figure(max(5.0, 1.5 + 0.16 * len(switches)), width=10)
        left, right = picture.subfigures(1, 2, squeeze=False, width_ratios=[1, 1])[0]
        quality, flops = left.subplots(2, 1, sharex=True)
        _draw_history(quality, flops, result)
        rates = right.subplots()
        draw_skip_rates(rates, result["by_difficulty"], switches)
        rates.set_title("How often each switch runs, test split")
        write_png(picture, file)


def plot_skip_rates(levels: list[dict[str, Any]], switches: list[str]) -> Figure:
    """The skip rate of each switch against difficulty."""
    with style():
        picture = figure(1.4 + 0.16 * len(switches))
        draw_skip_rates(picture.subplots(), levels, switches)
        return picture


def draw_skip_rates(axes: Axes, levels: Sequence[dict[str, Any]], switches: Sequence[str]) -> None:
    """Skip rate of each switch (rows, in execution order) at each level of difficulty; always run is solid."""
    rates = np.array([level["skip_rate"] for level in levels]).T
    mesh = axes.pcolormesh(rates, cmap=SKIP_RATE, vmin=0, vmax=1, edgecolor=INK, linewidth=0.1)
    names = [switch.replace(".", " ").replace("_", " ") for switch in switches]
    axes.set_yticks(np.arange(len(switches)) + 0.5, names, fontsize=7)
    axes.invert_yaxis()
    few = [level["instances"] < FEW for level in levels]
    labels = [
        f"{level['difficulty']}\n{level['flops_ratio_with_policy']:.0%}"
        + (f"\nn={level['instances']}!" if is_few else "")
        for level, is_few in zip(levels, few, strict=True)
    ]
    axes.set_xticks(np.arange(len(levels)) + 0.5, labels)
    axes.set_xlabel("difficulty, and FLOPs there" + (f"\n!: fewer than {FEW} instances" if any(few) else ""))
    axes.grid(False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(mesh, ax=axes, ticks=[0, 0.5, 1], shrink=0.6)
    bar.ax.invert_yaxis()
    bar.ax.set_yticklabels(["always\nruns", "half", "always\nskipped"], fontsize=7)
    bar.outline.set_linewidth(0.4)


def _draw_history(quality: Axes, flops: Axes, result: dict[str, Any]) -> None:
    """The validations, and at the end the result on the test split."""
    history = result["history"]
    steps = [entry["step"] for entry in history]
    validation: dict[str, Any] = {"marker": "o", "color": COLOURS[0]}
    quality.axhline(0, color=INK, linewidth=0.8, label="dense")
    quality.axhline(-100 * result["epsilon"], **ALLOWED)
    lost = [100 * (entry["quality"] - entry["quality_ref"]) for entry in history]
    if history:
        quality.plot(steps, lost, **validation, label="validation, most probable decisions")
        flops.plot(steps, [100 * entry["flops_ratio_with_policy"] for entry in history], **validation)
    end = max(steps, default=0)
    test: dict[str, Any] = {"marker": "*", "markersize": 12, "color": COLOURS[2], "linestyle": "none"}
    quality.plot(end, 100 * result["quality_difference"], **test, label="test, selected policy")
    flops.plot(end, 100 * result["flops_ratio_with_policy"], **test)
    if len(steps) < 2:  # the axis would have ticks between whole decisions
        flops.set_xticks([end])
    quality.set(ylabel="quality against dense, points", title="Quality and FLOPs")
    quality.figure.legend(*quality.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    flops.set(xlabel="decisions learned from", ylabel="FLOPs, % of dense", ylim=(0, flops_limit(flops.dataLim.ymax)))
