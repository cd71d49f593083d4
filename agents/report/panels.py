"""What pictures are made of: the plane of quality and FLOPs, curves, skip rates, single instances, profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from sd_gym.agents.report.style import INK, LOST, PAPER, RAN, SKIP_RATE, Look
from sd_gym.agents.runs.statistics import curve_interval, pareto_front

FEW = 30  # instances of a level, below which a rate is marked as of a small sample


class Points(NamedTuple):
    """Results of one agent's runs.

    Attributes:
        difference: Quality against dense, in points, ``[runs]``.
        flops: FLOPs, % of dense, ``[runs]``.
        learned_difference: The same of what learning ended with, before selection; of those runs that say so.
        learned_flops: The same.
    """

    difference: NDArray
    flops: NDArray
    learned_difference: NDArray
    learned_flops: NDArray


class Strip(NamedTuple):
    """A single instance.

    Attributes:
        label: What it is called.
        skip: Which switches were skipped, bool ``[switches]``.
        flops: FLOPs ratio.
        lost: Whether it lost more quality than may be lost.
        dropped: Share of the tokens that was dropped.
    """

    label: str
    skip: NDArray
    flops: float
    lost: bool
    dropped: float


def plane(axes: Axes, points: Mapping[str, Points], looks: Mapping[str, Look], epsilon: float) -> None:
    """Quality against FLOPs: a filled marker a run, a hollow one what it had learned, and the front of all runs."""
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axhline(-100 * epsilon, color=LOST, linewidth=1, linestyle="--")
    axes.plot(100, 0, marker="h", markersize=8, color=INK, linestyle="none", zorder=3)
    axes.annotate("dense", (100, 0), (-6, 5), textcoords="offset points", ha="right", fontsize=8.5)
    handles = []
    for name, of_agent in points.items():
        look = looks[name]
        hollow = {"markerfacecolor": "none", "alpha": 0.6, "markersize": 4}
        filled = {
            "markeredgecolor": look.color if look.color == INK else PAPER,
            "markeredgewidth": 0.6,
            "markersize": 7,
        }
        if look.color == INK:
            filled |= {"markeredgewidth": 1.4}
        shared = {"color": look.color, "marker": look.marker, "linestyle": "none"}
        axes.plot(of_agent.learned_flops, of_agent.learned_difference, **shared, **hollow)
        axes.plot(of_agent.flops, of_agent.difference, **shared, **filled, zorder=3)
        handles.append(Line2D([], [], label=name, **shared, **filled))
    reachable = [of_agent for name, of_agent in points.items() if not name.startswith("oracle")]
    if reachable:
        flops = np.concatenate([*(one.flops for one in reachable), *(one.learned_flops for one in reachable), [100.0]])
        lost = [*(one.difference for one in reachable), *(one.learned_difference for one in reachable), [0.0]]
        difference = np.concatenate(lost)
        front = pareto_front(difference, flops)
        axes.step(flops[front], difference[front], where="post", color=INK, linewidth=0.8, alpha=0.6)
        handles.append(Line2D([], [], color=INK, linewidth=0.8, alpha=0.6, label="front of all runs"))
    handles.append(Line2D([], [], color=LOST, linestyle="--", linewidth=1, label="as much as may be lost"))
    axes.set(xlabel="FLOPs, % of dense", ylabel="quality against dense, points")
    axes.set_xlim(left=0, right=104)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=2)


def curves(
    quality: Axes,
    flops: Axes,
    histories: Mapping[str, Sequence[list[dict[str, Any]]]],
    looks: Mapping[str, Look],
    epsilon: float,
) -> None:
    """What validation has seen: interquartile means over runs, with 95% intervals."""
    quality.axhline(0, color=INK, linewidth=0.8)
    quality.axhline(-100 * epsilon, color=LOST, linewidth=1, linestyle="--")
    for name, runs in histories.items():
        steps = np.unique([entry["step"] for history in runs for entry in history])
        read = {"quality": _read(runs, steps, lambda one: 100 * (one["quality"] - one["quality_ref"]))}
        read["flops"] = _read(runs, steps, lambda one: 100 * one["flops_ratio"])
        look = looks[name]
        for axes, values in ((quality, read["quality"]), (flops, read["flops"])):
            mean, low, high = curve_interval(values, samples=500)
            axes.fill_between(steps, low, high, color=look.color, alpha=0.15, linewidth=0)
            axes.plot(steps, mean, **look._asdict(), markersize=4, linewidth=1.4, label=name)
    quality.set(ylabel="quality against\ndense, points")
    quality.tick_params(labelbottom=False)
    flops.set(xlabel="decisions learned from", ylabel="FLOPs, % of dense", ylim=(0, 104))
    flops.locator_params(axis="x", nbins=5)
    handles, labels = flops.get_legend_handles_labels()
    flops.figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _read(runs: Sequence[list[dict[str, Any]]], steps: NDArray, value: Any) -> NDArray:
    """A value of each run at the same steps, ``[runs, steps]``."""
    return np.array([np.interp(steps, [one["step"] for one in run], [value(one) for one in run]) for run in runs])


def skip_rates(axes: Axes, levels: Sequence[dict[str, Any]], switches: Sequence[str]) -> None:
    """Skip rate of each switch (rows, in execution order) at each level of difficulty: what ran is solid."""
    rates = np.array([level["skip_rate"] for level in levels]).T
    mesh = axes.pcolormesh(rates, cmap=SKIP_RATE, vmin=0, vmax=1, edgecolor=INK, linewidth=0.1)
    axes.set_yticks(np.arange(len(switches)) + 0.5, [short_name(name) for name in switches], fontsize=7)
    axes.invert_yaxis()
    labels = [
        f"{level['difficulty']}\n{level['flops_ratio']:.0%}" + (f"\nn={level['instances']}!" if few(level) else "")
        for level in levels
    ]
    axes.set_xticks(np.arange(len(levels)) + 0.5, labels)
    axes.set_xlabel(
        "difficulty, and FLOPs there" + (f"\n!: fewer than {FEW} instances" if any(map(few, levels)) else "")
    )
    axes.grid(False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(mesh, ax=axes, ticks=[0, 0.5, 1], shrink=0.6)
    bar.ax.invert_yaxis()
    bar.ax.set_yticklabels(["always\nruns", "half", "always\nskipped"], fontsize=7)
    bar.outline.set_linewidth(0.4)


def few(level: dict[str, Any]) -> bool:
    """Whether a level of ``by_difficulty`` has so few instances that its rates say little."""
    return level["instances"] < FEW


def short_name(switch: str) -> str:
    """``encoder.3.cross_attention`` as ``encoder 3 cross attention``."""
    return switch.replace(".", " ").replace("_", " ")


def strips(axes: Axes, instances: Sequence[Strip], switches: Sequence[str]) -> None:
    """A row an instance, a cell a switch: filled where it ran, paper where it was skipped."""
    skip = np.array([one.skip for one in instances], dtype=float)
    axes.pcolormesh(skip, cmap=SKIP_RATE, vmin=0, vmax=1, edgecolor=INK, linewidth=0.25)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(instances)) + 0.5, [one.label for one in instances], fontsize=7.5)
    layers = [name.rpartition(".")[0] for name in switches]
    starts = [number for number, layer in enumerate(layers) if number == 0 or layers[number - 1] != layer]
    every = 1 + len(starts) // 13
    shown = starts[::every]
    axes.set_xticks(shown, [f"{layers[start][0]}{layers[start].rpartition('.')[2]}" for start in shown], fontsize=7.5)
    axes.tick_params(length=0)
    for start in starts[1:]:
        axes.axvline(start, color=INK, linewidth=0.9)
    for row, one in enumerate(instances):
        words = f" {one.flops:.0%}" + (f", {one.dropped:.0%} of tokens dropped" if one.dropped else "")
        axes.text(
            len(switches),
            row + 0.5,
            words + (" ✗ lost" if one.lost else ""),
            va="center",
            fontsize=7.5,
            color=LOST if one.lost else INK,
        )
    axes.grid(False)
    stacks = dict.fromkeys(name.partition(".")[0] for name in switches)
    axes.set_xlabel(f"layer ({', '.join(f'{stack[0]}: {stack}' for stack in stacks)})")
    faces = {"ran": RAN, "skipped": "none"}
    handles = [Patch(facecolor=colour, edgecolor=INK, label=label) for label, colour in faces.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=2)


def profiles(
    axes: Axes, found: Mapping[str, tuple[NDArray, NDArray, NDArray]], looks: Mapping[str, Look], thresholds: NDArray
) -> None:
    """Performance profiles: which share of runs saves more than so much, the quality kept."""
    for name, (share, low, high) in found.items():
        look = looks[name]
        axes.fill_between(100 * thresholds, 100 * low, 100 * high, color=look.color, alpha=0.15, linewidth=0)
        axes.plot(100 * thresholds, 100 * share, **look._asdict(), markersize=4, markevery=10, label=name)
    axes.set(xlabel="FLOPs saved with the quality kept, at least, %", ylabel="runs, %", ylim=(0, 103), xlim=(0, 100))
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
