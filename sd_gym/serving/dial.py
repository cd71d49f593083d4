"""Dials: they choose the operating point of each group."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sd_gym.envs.serving import dial


class ServerDial(Protocol):
    """Chooses the operating point of each group before the group is formed."""

    window: float  # seconds over which arrivals are counted

    def choose(self, queue_length: int, oldest_wait: float, arrival_rate: float) -> int:
        """The index of an operating point, from the number of waiting rows, seconds, and rows per second."""
        ...

    def answered(self, point: int, rows: int) -> None:
        """Called after a group: this many rows were answered at the point that it chose."""
        ...


@dataclass
class Fixed:
    """A dial that always chooses the same operating point."""

    point: int = 0
    window: float = 1.0

    def choose(self, queue_length: int, oldest_wait: float, arrival_rate: float) -> int:
        """The fixed operating point."""
        return self.point

    def answered(self, point: int, rows: int) -> None:
        """It remembers nothing."""


class Trained:
    """The dial of a run on a serving env. Its point 0 is dense; the batcher's point 0 skips most.

    Args:
        folder: Run folder.
        margins: Margins of the operating points that the server allows.

    Raises:
        FileNotFoundError: If the folder has no dial.
        ValueError: If the dial is damaged, or chooses among other points.
    """

    def __init__(self, folder: str | Path, margins: Sequence[float]) -> None:
        self._dial, self._last = dial.Dial.load(folder), len(margins) - 1
        config = self._dial.config
        self.window = config.deadline
        if (trained := len(config.points)) != len(margins):
            raise ValueError(
                f"the dial {folder} chooses among {trained} operating points, but the server allows {len(margins)} of "
                "its policy; change --allow-loss or --allow-flops, or train a dial on an env with as many 'points'"
            )
        of_env = [point.margin or 0.0 for point in config.points[::-1]]
        if config.policy is not None and not np.allclose(np.diff(of_env), np.diff(margins)):
            raise ValueError(
                f"the dial {folder} chooses among the operating points of {config.policy}, but the server's policy has "
                "others; train a dial on an env with this policy"
            )

    def choose(self, queue_length: int, oldest_wait: float, arrival_rate: float) -> int:
        """The operating point that the dial chooses, in the server's order."""
        return self._last - self._dial.choose(queue_length, oldest_wait, arrival_rate)

    def answered(self, point: int, rows: int) -> None:
        """Tell the dial, which observes how much its recent answers are expected to lose."""
        self._dial.answered(self._last - point, rows)
