"""Draws docs/switching.svg, the picture of docs/switching.md."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

RUNS, SKIPPED, TEXT = "#2e7d32", "#cfd8dc", "#263238"
NAMES = ["attention", "feed-forward", "attention", "feed-forward"]
RUN = [[1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]  # rows of the batch by sublayer


def main() -> None:
    """A batch of four rows walks through four sublayers; each sees only the rows that run it."""
    figure, axes = plt.subplots(figsize=(10, 3.6))
    for row in range(4):
        axes.text(-0.9, 3 - row + 0.32, f"row {row}", ha="center", color=TEXT)
    for column, name in enumerate(NAMES):
        left = column * 2.6
        running = [row for row in range(4) if RUN[row][column]]
        for row in range(4):
            axes.add_patch(Rectangle((left, 3 - row), 0.65, 0.65, color=RUNS if RUN[row][column] else SKIPPED))
        for place, row in enumerate(running):
            bottom = 3 - place
            axes.add_patch(Rectangle((left + 1.2, bottom), 0.65, 0.65, color=RUNS))
            axes.text(left + 1.52, bottom + 0.32, str(row), ha="center", va="center", color="white")
            start = (left + 0.68, 3 - row + 0.32)
            axes.annotate("", (left + 1.18, bottom + 0.32), start, arrowprops={"arrowstyle": "->", "color": TEXT})
        label = f"{name} of {len(running)} rows" if running else f"{name}: never called"
        axes.text(left + 0.95, -0.45, label, ha="center", color=TEXT, fontsize=9)
        axes.text(left + 0.95, 4.0, f"layer {column // 2}", ha="center", color=TEXT, fontsize=9)
    axes.set_xlim(-1.5, 10.2)
    axes.set_ylim(-0.8, 4.4)
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("switching.svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
