"""Logits of the steps of a path: FLOPs saved per unit of risk."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.baselines.search import path_steps
from torch import Tensor

LEAST_SAVED = 1e-4  # of the dense FLOPs: what a step saves at least, where it costs as much as it saves
LEAST_RISK = 1e-6  # a saved FLOPs ratio of 1, so that the exchange rate is finite
PART = 1024  # instances whose exchange rates are computed at once: each has one for any two masks


def step_logits(risk: Tensor, flops: Tensor) -> Tensor:
    """Logarithm of the FLOPs that each step of a path saves over the risk that it adds.

    Steps that only pay together (the next one saves more for less risk) have one exchange rate: that of the lower
    convex hull of risk over savings. So the rates fall along the path, and a bound on them ends it at the best mask.
    Of the risk, float32 ``[n, masks]``, the first (of dense) 0, and FLOPs ratios ``[masks]``; float32
    ``[n, masks - 1]``.
    """
    saved = (flops[:, None] - flops[None, :]).clamp(min=LEAST_SAVED).float()  # from one mask to a later one
    masks = torch.arange(len(flops))
    later = masks[:, None] < masks[None, :]
    slopes = []
    for part in risk.split(PART):
        rate = torch.where(later, (part[:, None, :] - part[:, :, None]) / saved, torch.inf)
        # The slope of a hull, by the minimax formula of isotonic regression: the highest, over where a stretch may
        # begin, of the lowest over where it may end.
        lowest = rate.flip(2).cummin(dim=2).values.flip(2)
        slopes.append(lowest.cummax(dim=1).values.diagonal(offset=1, dim1=1, dim2=2))
    return -torch.cat(slopes).clamp(min=LEAST_RISK).log()


def accepting_logits(risk: Tensor, saved: Tensor) -> Tensor:
    """Logarithm of the FLOPs ratio that accepting an answer saves over the risk that it adds, each ``[n, 1]``."""
    return saved.clamp(min=LEAST_SAVED).log() - risk.clamp(min=LEAST_RISK).log()


def component_logits(steps: Tensor, path: NDArray, nvec: NDArray) -> Tensor:
    """Logits ``[n, sum(nvec)]`` under which a policy takes the ``steps [n, masks - 1]`` of a path that are positive.

    A choice of a component has the sum of the steps that lead to it, and that of the first of the path (everything
    runs, or an answer is not accepted) has 0.
    """
    first = np.cumsum([0, *nvec[:-1]])
    leads = torch.zeros(steps.shape[1], int(nvec.sum()))
    for step, raised in enumerate(path_steps(list(path))):
        for component in raised:
            choice, start = path[step + 1, component], first[component]
            if choice > path[step, component]:
                leads[step, start + choice : start + nvec[component]] = 1
            else:  # to accept an answer is the first choice
                leads[step, start : start + choice + 1] = 1
    return steps @ leads
