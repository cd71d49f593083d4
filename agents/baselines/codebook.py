"""A few masks for agents that choose one of them: nested, so that a batch agrees on most of what it runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZE = 16


def nested_codebook(masks: NDArray, quality: NDArray, flops: NDArray, size: int = SIZE) -> list[int]:
    """The chain of masks, each skipping all that the one before skips and more, from which most is saved.

    If every input were given the last mask of the chain that keeps its quality, a step from one mask to the next would
    save the difference of their FLOPs on as many inputs as the next one keeps right: its mean quality. The chain with
    the highest sum of these products is found by dynamic programming; where the masks are spread by it, the quality
    falls.

    Args:
        masks: Decisions ``[masks, components]``; the dense one is among them.
        quality: Mean quality of each, ``[masks]``.
        flops: Mean FLOPs ratio of each, ``[masks]``.
        size: Masks to keep, at most.

    Returns:
        Rows of ``masks``, the dense one first.
    """
    nested = np.ones((len(masks), len(masks)), dtype=bool)  # whether the second skips all that the first does
    for component in masks.T:
        nested &= component[:, None] <= component[None, :]
    saved = flops[:, None] - flops[None, :]
    gain = np.where(nested & (saved > 0), saved * quality, -np.inf)
    worth = [np.where(masks.any(axis=1), -np.inf, 0.0)]  # of the best chain of so many masks that ends at each
    before = []
    for _ in range(size - 1):
        longer = worth[-1][:, None] + gain
        before.append(longer.argmax(axis=0))
        worth.append(longer.max(axis=0))
    length, last = np.unravel_index(int(np.argmax(worth)), (size, len(masks)))
    chain = [int(last)]
    for step in reversed(before[:length]):
        chain.append(int(step[chain[-1]]))
    return chain[::-1]
