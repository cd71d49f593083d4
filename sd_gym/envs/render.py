"""Pictures of a decision: one line of text, or a small image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CELL = 18  # pixels
GAP = 2
RAN, SKIPPED, BACKGROUND = (46, 125, 50), (207, 216, 220), (255, 255, 255)
LETTERS = {"attention": "a", "cross_attention": "c", "feed_forward": "f"}


def as_text(names: list[str], skip: NDArray) -> str:
    """One line: for each layer the letters of the sublayers that ran (a, c, f), a dot for each that was skipped.

    ``encoder af af .. | decoder acf a.f ...``
    """
    stacks: dict[str, dict[str, str]] = {}
    for name, skipped in zip(names, skip, strict=True):
        stack, layer, kind = name.split(".")
        layers = stacks.setdefault(stack, {})
        layers[layer] = layers.get(layer, "") + ("." if skipped else LETTERS[kind])
    return " | ".join(f"{stack} {' '.join(layers.values())}" for stack, layers in stacks.items())


def as_image(names: list[str], skip: NDArray) -> NDArray:
    """A grid, uint8 ``[h, w, 3]``: a column a layer, a row a kind; green = ran, grey = skipped, white = none."""
    places = [name.rsplit(".", 1) for name in names]
    columns = {layer: number for number, layer in enumerate(dict.fromkeys(layer for layer, _ in places))}
    rows = {kind: number for number, kind in enumerate(kind for kind in LETTERS if any(k == kind for _, k in places))}
    grid = np.full((len(rows), len(columns), 3), BACKGROUND, dtype=np.uint8)
    for (layer, kind), skipped in zip(places, skip, strict=True):
        grid[rows[kind], columns[layer]] = SKIPPED if skipped else RAN
    image = np.full((len(rows) * (CELL + GAP) + GAP, len(columns) * (CELL + GAP) + GAP, 3), BACKGROUND, dtype=np.uint8)
    for row in range(len(rows)):
        for column in range(len(columns)):
            top, left = row * (CELL + GAP) + GAP, column * (CELL + GAP) + GAP
            image[top : top + CELL, left : left + CELL] = grid[row, column]
    return image
