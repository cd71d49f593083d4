"""The charts of reports: quality and FLOPs, curves, single instances and profiles."""

from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from sd_gym.agents.drawing.style import ALLOWED, INK, LOST, PAPER, RAN, SKIP_RATE, AgentStyle, flops_limit
from sd_gym.agents.runs.statistics import curve_interval, pareto_front

LEGEND_WIDTH = 60  # letters that fit in the width of a picture


class ExampleDecision(NamedTuple):
    """The decision on an instance: ``skip`` is bool ``[switches]``, ``dropped`` the share of tokens dropped.

    ``went_on``: whether what was skipped ran after all, after the answer.
    """

    label: str
    skip: NDArray
    flops: float
    lost: bool
    dropped: float
    went_on: bool


def draw_results(
    axes: Axes, points: Mapping[str, Sequence[NDArray]], styles: Mapping[str, AgentStyle], epsilon: float
) -> None:
    """Quality against FLOPs: selected policies (filled), policies as learned (hollow), and the front of all runs.

    ``points`` has four arrays ``[runs]`` per agent: quality against dense (points) and FLOPs (% of dense) as selected,
    then both as learned.
    """
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axhline(-100 * epsilon, **ALLOWED)
    axes.plot(100, 0, marker="h", markersize=8, color=INK, linestyle="none", zorder=3)
    axes.annotate("dense", (100, 0), (-6, 5), textcoords="offset points", ha="right", fontsize=8.5)
    handles = []
    hollow: dict[str, Any] = {"markerfacecolor": "none", "alpha": 0.6, "markersize": 4}
    for name, (difference, flops, learned_difference, learned_flops) in points.items():
        color, marker, _ = styles[name]
        edge = {"markeredgecolor": INK, "markeredgewidth": 1.4} if color == INK else {"markeredgecolor": PAPER}
        filled: dict[str, Any] = {"markeredgewidth": 0.6, "markersize": 7, **edge}
        shared: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "none"}
        axes.plot(learned_flops, learned_difference, **shared, **hollow)
        axes.plot(flops, difference, **shared, **filled, zorder=3)
        handles.append(Line2D([], [], label=name, **shared, **filled))
    if reachable := [agent for name, agent in points.items() if not name.startswith("oracle")]:
        pairs = [pair for agent in reachable for pair in (agent[:2], agent[2:])]  # as selected and as learned
        difference, flops = map(np.concatenate, zip(*pairs, ([0.0], [100.0]), strict=True))
        front = pareto_front(difference, flops)
        axes.step(flops[front], difference[front], where="post", color=INK, linewidth=0.8, alpha=0.6)
        handles.append(Line2D([], [], color=INK, linewidth=0.8, alpha=0.6, label="front of all runs"))
    handles.append(Line2D([], [], **ALLOWED))
    axes.set(xlabel="FLOPs, % of dense", ylabel="quality against dense, points")
    axes.set_xlim(left=0, right=flops_limit(axes.dataLim.xmax))
    _legend(axes, handles, 2)


def draw_curves(
    quality: Axes,
    flops: Axes,
    histories: Mapping[str, Sequence[list[dict[str, Any]]]],
    styles: Mapping[str, AgentStyle],
    epsilon: float,
) -> None:
    """Validation during learning: interquartile means over runs, with 95% intervals."""
    quality.axhline(0, color=INK, linewidth=0.8)
    quality.axhline(-100 * epsilon, **ALLOWED)
    for name, runs in histories.items():
        steps = np.unique([entry["step"] for history in runs for entry in history])
        lost = _at_steps(runs, steps, lambda entry: 100 * (entry["quality"] - entry["quality_ref"]))
        cost = _at_steps(runs, steps, lambda entry: 100 * entry["flops_ratio_with_policy"])
        for axes, values in ((quality, lost), (flops, cost)):
            mean, low, high = curve_interval(values, samples=500)
            axes.fill_between(steps, low, high, color=styles[name].color, alpha=0.15, linewidth=0)
            axes.plot(steps, mean, **styles[name]._asdict(), markersize=4, linewidth=1.4, label=name)
    quality.set(ylabel="quality against\ndense, points")
    quality.tick_params(labelbottom=False)
    flops.set(xlabel="decisions learned from", ylabel="FLOPs, % of dense", ylim=(0, flops_limit(flops.dataLim.ymax)))
    flops.locator_params(axis="x", nbins=5)
    _legend(quality, quality.get_legend_handles_labels()[0], 3)


def _at_steps(
    runs: Sequence[list[dict[str, Any]]], steps: NDArray, value: Callable[[dict[str, Any]], float]
) -> NDArray:
    """A value of each run at the same steps, ``[runs, steps]``."""
    return np.array([np.interp(steps, [entry["step"] for entry in run], [*map(value, run)]) for run in runs])


def draw_decisions(axes: Axes, decisions: Sequence[ExampleDecision], switches: Sequence[str]) -> None:
    """A row per instance, a cell per switch: filled if it ran, empty if it was skipped."""
    skip = np.array([decision.skip for decision in decisions], dtype=float)
    axes.pcolormesh(skip, cmap=SKIP_RATE, vmin=0, vmax=1, edgecolor=INK, linewidth=0.25)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(decisions)) + 0.5, [decision.label for decision in decisions], fontsize=7.5)
    layers = [name.rpartition(".")[0] for name in switches]
    starts = [number for number, layer in enumerate(layers) if number == 0 or layers[number - 1] != layer]
    shown = starts[:: 1 + len(starts) // 13]
    axes.set_xticks(shown, [f"{layers[start][0]}{layers[start].rpartition('.')[2]}" for start in shown], fontsize=7.5)
    axes.tick_params(length=0)
    for start in starts[1:]:
        axes.axvline(start, color=INK, linewidth=0.9)
    for row, (_, _, flops, lost, dropped, went_on) in enumerate(decisions):
        tokens = (f", {dropped:.0%} of tokens dropped" if dropped else "") + (", went on" if went_on else "")
        label, color = (" ✗ lost", LOST) if lost else ("", INK)
        axes.text(len(switches), row + 0.5, f" {flops:.0%}{tokens}{label}", va="center", fontsize=7.5, color=color)
    axes.grid(False)
    stacks = dict.fromkeys(name.partition(".")[0] for name in switches)
    axes.set_xlabel(f"layer ({', '.join(f'{stack[0]}: {stack}' for stack in stacks)})")
    faces = {"ran": RAN, "skipped": "none"}
    handles = [Patch(facecolor=colour, edgecolor=INK, label=label) for label, colour in faces.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=2)


def draw_profiles(
    axes: Axes,
    profiles: Mapping[str, tuple[NDArray, NDArray, NDArray]],
    styles: Mapping[str, AgentStyle],
    thresholds: NDArray,
) -> None:
    """Performance profiles: the share of runs that save more than each threshold with the quality kept."""
    for name, (share, low, high) in profiles.items():
        axes.fill_between(100 * thresholds, 100 * low, 100 * high, color=styles[name].color, alpha=0.15, linewidth=0)
        axes.plot(100 * thresholds, 100 * share, **styles[name]._asdict(), markersize=4, markevery=10, label=name)
    axes.set(xlabel="FLOPs saved with the quality kept, at least, %", ylabel="runs, %", ylim=(0, 103), xlim=(0, 100))
    _legend(axes, axes.get_legend_handles_labels()[0], 3)


def _legend(axes: Axes, handles: Sequence[Any], columns: int) -> None:
    """A legend below, in at most so many columns, that is no wider than the picture."""
    labels = [fill(handle.get_label(), LEGEND_WIDTH, break_on_hyphens=False) for handle in handles]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(1, min(columns, LEGEND_WIDTH // (longest + 5)))  # the marker takes the room of five letters
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)
