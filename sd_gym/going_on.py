"""Going on: after a cheap answer, compute the dense one from the first sublayer that the cheap pass skipped.

Everything before that sublayer equals the dense pass, so it is not run again. Early exit is a mask that skips the last
layers, plus going on; a cascade is any mask, plus going on.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

ANSWER = "answer"  # the stage after the head has answered: accept (0), or go on (1)


def stages_of_pass(stages: Iterable[str]) -> list[str]:
    """The names of all stages except ``answer``, which is after the pass."""
    return [name for name in stages if name != ANSWER]


def masks_and_goes_on(decisions: NDArray, components: int) -> tuple[NDArray, NDArray]:
    """Masks ``[n, components]`` of decisions, and whether each row goes on, bool ``[n]``.

    Decisions are ``[n, components]`` or, with the answer stage, ``[n, components + 1]``. A row that skipped nothing
    does not go on: nothing is left to run.
    """
    masks = decisions[:, :components]
    if decisions.shape[1] == components:
        return masks, np.zeros(len(masks), dtype=np.bool_)
    return masks, (decisions[:, components] == 1) & masks.any(axis=1)


def answer_masks(decisions: NDArray, components: int) -> NDArray:
    """The masks ``[n, components]`` that give the final answers: dense where a row goes on."""
    masks, goes_on = masks_and_goes_on(decisions, components)
    return np.where(goes_on[:, None], 0, masks) if goes_on.any() else masks


def resumed_from(masks: NDArray, points: Sequence[int]) -> NDArray:
    """The switch from which each row goes on, int64 ``[n]``; the number of switches if nothing was skipped.

    Args:
        masks: Int ``[n, switches + 1]``; a row with a token level other than 0 restarts from switch 0.
        points: Indices of the switches before which a pass can be resumed, ascending, starting with 0.
    """
    switches = masks.shape[1] - 1
    skipped = masks[:, :-1] != 0
    first = np.where(skipped.any(axis=1), skipped.argmax(axis=1), switches)
    stops = np.append(points, switches)
    return np.where(masks[:, -1] != 0, 0, stops[np.searchsorted(stops, first, side="right") - 1])


def going_on_flops(always: NDArray, switched: NDArray, resumed: NDArray, read: NDArray | None = None) -> NDArray:
    """FLOPs of going on, int64 ``[n]``: dense from a switch on, and the head again; 0 where everything has run.

    Args:
        always: FLOPs that no switch saves, ``[n]``.
        switched: FLOPs of each switch, ``[n, switches]``.
        resumed: See ``resumed_from``, ``[n]``.
        read: Those of each switch on the input alone, ``[n, switches]``: earlier switches run again on a text that is
            generated after it. ``None``: no switch before ``resumed`` runs on more than the input.
    """
    switches = switched.shape[1]
    done = (switched if read is None else read) * (np.arange(switches) < resumed[:, None])
    return np.where(resumed < switches, always + switched.sum(axis=1) - done.sum(axis=1), 0)
