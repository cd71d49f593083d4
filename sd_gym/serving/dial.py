"""Dials: they choose the operating point of each group."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd_gym.envs.serving import dial


@dataclass
class ServerDial:
    """Chooses the operating point of each group before the group is formed: always ``point``, unless a subclass does.

    ``window``: seconds over which arrivals are counted.
    """

    point: int = 0
    window: float = 1.0

    def choose(self, queue_length: int, oldest_wait: float, arrival_rate: float) -> int:
        """The index of an operating point, from the number of waiting rows, seconds, and rows per second."""
        return self.point

    def answered(self, point: int, rows: int) -> None:
        """Called after a group: this many rows were answered at the point that it chose."""


class Trained(ServerDial):
    """The dial of a run on a serving env.

    It counts its points from dense (0) to bold, as its env does. The server's point 0 is the boldest.

    Args:
        folder: Run folder.
        margins: Margins of the operating points that the server allows; the dial may choose among some of them.

    Attributes:
        points: Indices of the server's points that the dial may choose, from bold to dense.

    Raises:
        FileNotFoundError: If the folder has no dial.
        ValueError: If the dial is damaged, or chooses among other points.
    """

    def __init__(self, folder: str | Path, margins: Sequence[float]) -> None:
        self._dial = dial.Dial.load(folder)
        config = self._dial.config
        self.window = config.deadline
        if config.policy is not None:
            places = _places([point.margin or 0.0 for point in config.points[::-1]], margins)
            if places is None:
                raise ValueError(
                    f"the dial {folder} chooses among operating points of {config.policy} that the server's policy "
                    "lacks, or does not allow; change --allow-loss or --allow-flops, or train a dial on an env with "
                    "this policy"
                )
            self.points = places
        elif len(config.points) == len(margins):
            self.points = list(range(len(margins)))
        else:
            raise ValueError(
                f"the dial {folder} chooses among {len(config.points)} operating points, but the server allows "
                f"{len(margins)} of its policy; change --allow-loss or --allow-flops, or train a dial on an env with "
                "as many 'points'"
            )

    def choose(self, queue_length: int, oldest_wait: float, arrival_rate: float) -> int:
        """The operating point that the dial chooses, an index of the server's."""
        return self.points[-1 - self._dial.choose(queue_length, oldest_wait, arrival_rate)]

    def answered(self, point: int, rows: int) -> None:
        """Tell the dial, which observes how much its recent answers are expected to lose."""
        self._dial.answered(len(self.points) - 1 - self.points.index(point), rows)


def _places(wanted: Sequence[float], margins: Sequence[float]) -> list[int] | None:
    """The index of each of the dial's margins in the server's ``margins``; ``None`` if one is missing.

    Each are relative to their own default point. So they are compared after a shift that makes the last ones equal:
    both end with dense.
    """
    shifted = np.array(wanted) + (margins[-1] - wanted[-1])
    places = np.abs(shifted[:, None] - np.array(margins)).argmin(axis=1)
    return places.tolist() if np.allclose(np.array(margins)[places], shifted, rtol=0, atol=1e-6) else None
