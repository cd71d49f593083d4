"""Going on: the dense answer after a cheap one, from in front of the first sublayer that the cheap one skipped.

What ran before that sublayer equals the dense pass, so it is not run again. Early exit is a mask that skips the last
layers, and going on; a cascade is any mask, and going on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray
ANSWER = "answer"  # the stage after the head has answered: accept (0), or go on (1)


def stages_of_pass(stages: Iterable[str]) -> list[str]:
    """The names of stages but ``answer``, which comes after the pass."""
    return [name for name in stages if name != ANSWER]


def parted(decisions: Array, components: int) -> tuple[Array, Array]:
    """Masks ``[n, components]`` of decisions, and which rows go on, bool ``[n]``.

    Decisions are ``[n, components]`` or, with the answer stage, ``[n, components + 1]``.
    """
    masks = decisions[:, :components]
    if decisions.shape[1] == components:
        return masks, np.zeros(len(masks), dtype=np.bool_)
    return masks, decisions[:, components] == 1


def answering(decisions: Array, components: int) -> Array:
    """The masks ``[n, components]`` whose answers are given: dense where a row goes on."""
    masks, goes_on = parted(decisions, components)
    return np.where(goes_on[:, None], 0, masks) if goes_on.any() else masks


def resumed_from(masks: Array, points: Sequence[int]) -> Array:
    """The switch from which each row goes on, int64 ``[n]``; the number of switches where nothing was skipped.

    Args:
        masks: Int ``[n, switches + 1]``; a token level other than 0 sends the whole pass back to its start.
        points: Numbers of the switches in front of which a pass can be taken up again, ascending, 0 the first.
    """
    switches = masks.shape[1] - 1
    skipped = masks[:, :-1] != 0
    first = np.where(skipped.any(axis=1), skipped.argmax(axis=1), switches)
    stops = np.append(points, switches)
    return np.where(masks[:, -1] != 0, 0, stops[np.searchsorted(stops, first, side="right") - 1])


def going_on_flops(always: Array, switched: Array, resumed: Array) -> Array:
    """FLOPs of going on, int64 ``[n]``: dense from a switch on, and the head once more; 0 where all has run.

    Of the dense FLOPs that no switch saves, ``[n]``, those of each switch, ``[n, switches]``, and ``resumed_from``.
    """
    switches = switched.shape[1]
    rest = (switched * (np.arange(switches) >= resumed[:, None])).sum(axis=1)
    return np.where(resumed < switches, always + rest, 0)
