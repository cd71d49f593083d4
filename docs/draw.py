"""Draws the pictures of the pages, light and dark: ``python docs/draw.py``.

Learning curves are of docs/curves.json. ``python docs/draw.py runs/curves`` writes it anew from the runs in a folder of
``sd-gym compare``. The latency is of docs/latency.json, the ``serving.json`` of benchmarks/serving.py.
"""

import json
import re
import sys
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sd_gym.envs.table_files import table_folder

DOCS = Path(__file__).parent
THEMES = {
    "light": {"text": "#1f2933", "run": "#0072b2", "skip": "#d5dbe1", "faint": "#b4bcc5", "on_run": "#ffffff"},
    "dark": {"text": "#e6e9ee", "run": "#56b4e9", "skip": "#4a5160", "faint": "#666e7c", "on_run": "#10151c"},
}
NAMES = ["attention", "feed-forward", "attention", "feed-forward"]
RUN = [[1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]  # rows of the batch by sublayer
INPUTS = [
    ("easy", "A lovely film.", [1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0]),
    ("hard", "Hardly good, but not as bad as they say.", [1] * 7 + [0] + [1] * 4),
]
KEY = [(0, "a", "run", "attention"), (3.4, "f", "run", "feed-forward"), (7.4, "-", "skip", "skipped, not run")]
TABLES = {"TREC": "classification-trec", "AGNews": "classification-agnews"}
AGENTS = {"hull": "s", "full-information": "*", "imitation": "o", "ppo": "^", "a2c": "D"}
LEARNERS = {
    "ppo": "#0072b2",
    "a2c": "#e69f00",
    "ppo_lagrangian": "#009e73",
    "ppo_lex": "#56b4e9",
    "reinforce": "#d55e00",
    "imitation": "#cc79a7",
}
CURVES = {"reward": "validation/reward", "flops": "validation/flops_ratio"}
COLOURS = {"hull": "#d55e00", "full-information": "#009e73", "imitation": "#cc79a7", "ppo": "#0072b2", "a2c": "#e69f00"}


def draw_idea(colours: dict[str, str]) -> None:
    """An easy and a hard input pass through six layers; the policy says which sublayers run."""
    _, axes = plt.subplots(figsize=(6.4, 3.9))
    axes.text(0, 4.25, "For each input, a policy decides what runs.", color=colours["text"], fontsize=15)
    for number, (kind, text, runs) in enumerate(INPUTS):
        top = 2.75 - 1.75 * number
        axes.text(0, top + 0.45, f"{kind}:", color=colours["text"], fontsize=14, weight="bold")
        axes.text(1.75, top + 0.45, text, color=colours["text"], fontsize=14, style="italic")
        for place, run in enumerate(runs):
            left = place * 0.78 + 0.1 * (place // 2)
            axes.add_patch(Rectangle((left, top - 0.5), 0.68, 0.78, color=colours["run" if run else "skip"]))
            colour = colours["on_run" if run else "text"]
            letter = "af"[place % 2] if run else "-"
            axes.text(
                left + 0.34, top - 0.12, letter, ha="center", va="center", color=colour, fontsize=14, weight="bold"
            )
        axes.text(10.15, top - 0.12, f"{sum(runs)} of {len(runs)}", color=colours["text"], fontsize=14, va="center")
    for left, letter, colour, text in KEY:
        axes.add_patch(Rectangle((left, -0.33), 0.5, 0.5, color=colours[colour]))
        shown = {"ha": "center", "weight": "bold", "color": colours["on_run" if colour == "run" else "text"]}
        axes.text(left + 0.25, -0.2, letter, fontsize=12, **shown)
        axes.text(left + 0.65, -0.22, text, color=colours["text"], fontsize=12.5)
    axes.set(xlim=(-0.1, 12.4), ylim=(-0.45, 4.7))
    axes.axis("off")


def draw_concepts(colours: dict[str, str]) -> None:
    """A pass with three stages, its switches and its reward; then operating points and the guarantee."""
    _, axes = plt.subplots(figsize=(6.4, 5.2))

    def write(x: float, y: float, text: str, **how: object) -> None:
        axes.text(x, y, text, **{"color": colours["text"], "fontsize": 13, "va": "center"} | how)

    write(0, 8.2, "stages: the policy decides", weight="bold")
    for left, name in ((0.2, "first"), (4.5, "middle"), (8.8, "answer")):
        axes.add_patch(Rectangle((left, 6.9), 2.2, 0.75, fill=False, edgecolor=colours["text"]))
        write(left + 1.1, 7.27, name, ha="center")
        axes.annotate(
            "", (left + 1.1, 6.15), (left + 1.1, 6.85), arrowprops={"arrowstyle": "->", "color": colours["text"]}
        )
    for place, run in enumerate([1, 0, 1, 1, 0, 0, 1, 0, 0, 1]):
        left = place * 0.8 + 0.5 * (place // 5)
        axes.add_patch(Rectangle((left + 0.1, 5.3), 0.65, 0.75, color=colours["run" if run else "skip"]))
    write(9.9, 5.68, "accept or\ngo on", ha="center")
    write(0, 4.75, "switches; the decision says which are skipped")
    write(0, 3.6, "reward", weight="bold")
    write(2.2, 3.6, "savings - penalty · (dense quality - quality)")
    write(0, 2.5, "guarantee", weight="bold")
    for place, colour in enumerate(["run", "run", "run", "run", "fail", "skip", "skip"]):
        axes.plot(3.4 + 1.05 * place, 2.5, "o", markersize=13, color=colours.get(colour, "#d55e00"))
    axes.plot(3.4 + 1.05 * 3, 2.5, "o", markersize=20, fillstyle="none", color=colours["text"])
    write(3.2, 1.75, "dense")
    write(9.9, 1.75, "bold", ha="right")
    write(0, 0.9, "Operating points are tested in this order. The last one\nbefore the first failure is kept.")
    axes.set(xlim=(-0.1, 11.2), ylim=(0.3, 8.6))
    axes.axis("off")


def draw_switching(colours: dict[str, str]) -> None:
    """A batch of four rows passes through four sublayers; each gets only the rows that run it."""
    _, axes = plt.subplots(figsize=(10, 3.6))
    for row in range(4):
        axes.text(-0.9, 3 - row + 0.22, f"row {row}", ha="center", color=colours["text"], fontsize=12)
    for column, name in enumerate(NAMES):
        left = column * 2.6
        running = [row for row in range(4) if RUN[row][column]]
        for row in range(4):
            axes.add_patch(Rectangle((left, 3 - row), 0.65, 0.65, color=colours["run" if RUN[row][column] else "skip"]))
        for place, row in enumerate(running):
            bottom = 3 - place
            axes.add_patch(Rectangle((left + 1.2, bottom), 0.65, 0.65, color=colours["run"]))
            axes.text(left + 1.52, bottom + 0.32, str(row), ha="center", va="center", color=colours["on_run"])
            start = (left + 0.68, 3 - row + 0.32)
            arrow = {"arrowstyle": "->", "color": colours["text"]}
            axes.annotate("", (left + 1.18, bottom + 0.32), start, arrowprops=arrow)
        label = f"{name}\nof {len(running)} rows" if running else f"{name}\nnever called"
        axes.text(left + 0.95, -0.85, label, ha="center", color=colours["text"], fontsize=12)
        axes.text(left + 0.95, 4.0, f"layer {column // 2}", ha="center", color=colours["text"], fontsize=12)
    axes.set(xlim=(-1.5, 10.2), ylim=(-0.9, 4.4))
    axes.axis("off")


def draw_front(colours: dict[str, str]) -> None:
    """Loss against FLOPs on two tables of real data: the curves of the tables, the agents of docs/results.md."""
    figure, both = plt.subplots(1, 2, figsize=(6.8, 4.6), sharey=True)
    for axes, (name, folder) in zip(both, TABLES.items(), strict=True):
        curves = json.loads((table_folder(f"tables/{folder}") / "references.json").read_text())["curves"]
        for kind, label in (("hull", "hull, in hindsight"), ("full_information", "full information, in hindsight")):
            points = curves[kind]
            colour = COLOURS[kind.replace("_", "-")]
            axes.plot([100 * x for x in points["flops"]], [100 * y for y in points["loss"]], color=colour, label=label)
        for agent, (flops, loss) in _selected(name).items():
            shown = {"color": COLOURS[agent], "edgecolors": colours["text"], "s": 70, "zorder": 3}
            axes.scatter(flops, loss, marker=AGENTS[agent], label=f"{agent}, selected", **shown)
        _dress(axes, name, colours)
    both[0].set_ylabel("quality lost, points", fontsize=13)
    _legend(figure, both[0], colours, 2)
    figure.subplots_adjust(bottom=0.43, wspace=0.08)


def _selected(table: str) -> dict[str, tuple[float, float]]:
    """FLOPs and points lost of each agent as selected, after the most decisions, in docs/results.md."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (DOCS / "results.md").read_text().splitlines()]
    found = {}
    for row in (row for row in rows if row[:1] == [table]):
        agent = row[1].split()[0]
        if agent in AGENTS:
            flops, points = re.search(r"([\d.]+)%.*\(([-+][\d.]+)\)", row[3]).groups()
            found[agent] = (float(flops), -float(points))
    return found


def _dress(axes: Axes, name: str, colours: dict[str, str]) -> None:
    axes.set_title(name, color=colours["text"], fontsize=13)
    axes.set_xlabel("FLOPs, % of dense", fontsize=13)
    axes.set(xlim=(25, 102), ylim=(-0.6, 3))
    axes.axhline(0, color=colours["skip"], linewidth=1)
    _colour(axes, colours)


def _legend(figure: Figure, axes: Axes, colours: dict[str, str], columns: int, names: list[str] | None = None) -> None:
    """The legend of one part, below the picture; if names are given, only these."""
    entries = [entry for entry in zip(*axes.get_legend_handles_labels(), strict=True) if entry[1] in (names or entry)]
    how = {"ncols": columns, "loc": "lower center", "frameon": False, "labelcolor": colours["text"], "fontsize": 12}
    figure.legend(*zip(*entries, strict=True), **how)


def _colour(axes: Axes, colours: dict[str, str]) -> None:
    axes.tick_params(which="both", colors=colours["text"], labelsize=12)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(colours["text"])
    for spine in axes.spines.values():
        spine.set_color(colours["skip"])


def draw_curves(colours: dict[str, str], learner: str | None = None) -> None:
    """Reward and FLOPs of the learners over decisions; if one is named, the others are grey."""
    curves = json.loads((DOCS / "curves.json").read_text())
    figure, both = plt.subplots(1, 2, figsize=(6.8, 4.1))
    drawn = sorted(LEARNERS, key=lambda name: name == learner)  # the named one is on top
    for axes, (key, title) in zip(both, {"reward": "reward", "flops": "FLOPs, % of dense"}.items(), strict=True):
        for name in drawn:
            curve, is_grey = curves[name], learner not in (None, name)
            seeds = np.array(curve[key]) * (100 if key == "flops" else 1)
            how = {"color": colours["faint"] if is_grey else LEARNERS[name]}
            marker = "D" if len(curve["decisions"]) == 1 else ""
            axes.plot(curve["decisions"], seeds.mean(axis=0), marker=marker, label=name, linewidth=2, **how)
            if learner == name and marker:
                axes.vlines(curve["decisions"], seeds.min(axis=0), seeds.max(axis=0), linewidth=2, **how)
            elif learner == name:
                axes.fill_between(curve["decisions"], seeds.min(axis=0), seeds.max(axis=0), alpha=0.25, **how)
        axes.set_title(title, color=colours["text"], fontsize=13)
        axes.set_xlabel("decisions", fontsize=13)
        axes.set(xlim=(0, 21_000), xticks=[0, 10_000, 20_000], xticklabels=["0", "10,000", "20,000"])
        _colour(axes, colours)
    _legend(figure, both[0], colours, 3, drawn if learner is None else [learner])
    figure.subplots_adjust(bottom=0.36 if learner is None else 0.28, wspace=0.3)


def curves_picture(colours: dict[str, str], learner: str) -> bytes:
    """The learning curve of one learner among the others, as SVG."""
    file = BytesIO()
    with plt.rc_context({"svg.fonttype": "none"}):
        draw_curves(colours, learner)
        plt.savefig(file, bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close()
    return file.getvalue()


def read_curves(folder: Path) -> None:
    """Write docs/curves.json from the TensorBoard events of runs, ``FOLDER/ENV/LEARNER-SEED``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = {}
    for name in LEARNERS:
        runs = [EventAccumulator(str(run)).Reload() for run in sorted(folder.glob(f"*/{name}-[0-9]"))]
        steps = [event.step for event in runs[0].Scalars(CURVES["reward"])]
        curves[name] = {"decisions": steps} | {
            key: [[round(event.value, 4) for event in run.Scalars(tag)] for run in runs] for key, tag in CURVES.items()
        }
    lines = [f'"{name}": {json.dumps(curve)}' for name, curve in curves.items()]
    (DOCS / "curves.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def draw_latency(colours: dict[str, str]) -> None:
    """p99 latency of a server by its load, for each way to serve."""
    measured = json.loads((DOCS / "latency.json").read_text())
    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    for number, (name, arm) in enumerate(measured["arms"].items()):
        probes = sorted((probe[0], 1000 * probe[3]) for probe in arm["probes"] if np.isfinite(probe[3]))
        colour = [colours["text"], *LEARNERS.values()][number]
        axes.plot(*zip(*probes, strict=True), "o-", label=name, markersize=4, color=colour)
    limit = 1000 * measured["limit"]
    axes.axhline(limit, color=colours["faint"], linestyle="--", linewidth=1)
    axes.text(sum(axes.get_xlim()) / 2, limit * 1.06, "limit", ha="center", color=colours["text"], fontsize=13)
    axes.set_xlabel("requests a second", fontsize=13)
    axes.set_ylabel("p99 latency, ms", fontsize=13)
    axes.set_yscale("log")
    axes.set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    axes.set_yticks([], minor=True)
    _legend(figure, axes, colours, 2)
    figure.subplots_adjust(bottom=0.36)
    _colour(axes, colours)


def main() -> None:
    """Write all pictures."""
    if len(sys.argv) > 1:
        read_curves(Path(sys.argv[1]))
    plt.rcParams["svg.fonttype"] = "path"
    plt.rcParams["svg.hashsalt"] = "sd_gym"
    for theme, colours in THEMES.items():
        for name, draw in (
            ("idea", draw_idea),
            ("concepts", draw_concepts),
            ("switching", draw_switching),
            ("front", draw_front),
            ("curves", draw_curves),
            ("latency", draw_latency),
        ):
            draw(colours)
            plt.savefig(DOCS / f"{name}_{theme}.svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
            plt.close()


if __name__ == "__main__":
    main()
