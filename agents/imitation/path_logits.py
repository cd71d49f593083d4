"""Logits of the steps of a path: FLOPs saved per unit of risk."""

import torch
from numpy.typing import NDArray
from sd_gym.agents.baselines.search import path_steps
from torch import Tensor

from sd_gym.policy.choices import first_columns

LEAST_SAVED = 1e-4  # least saving of a step, as a share of the dense FLOPs
LEAST_RISK = 1e-6  # least risk of a step, so that the exchange rate is finite
AVOIDED = 6.0  # log-odds against masks far above the hull
RATES = 2**22  # exchange rates per computation; each instance has one for any two masks


def step_logits(risk: Tensor, flops: Tensor) -> Tensor:
    """Logarithm of the exchange rate of each step of a path: saved FLOPs over added risk.

    If the next step saves more for less risk, both have one exchange rate: that of the lower convex hull of risk over
    savings. So the rates fall along the path, and a bound on them ends it at the best mask.

    Args:
        risk: Risk of each mask, float32 ``[n, masks]``; 0 for the first one, which is dense.
        flops: FLOPs ratios ``[masks]``.

    Returns:
        float32 ``[n, masks - 1]``.
    """
    saved = (flops[:, None] - flops[None, :]).clamp(min=LEAST_SAVED).float()  # from one mask to a later one
    masks = torch.arange(len(flops))
    later = masks[:, None] < masks[None, :]
    slopes = []
    for part in risk.split(max(1, RATES // len(flops) ** 2)):
        rate = torch.where(later, (part[:, None, :] - part[:, :, None]) / saved, torch.inf)
        # The slope of a hull by the minimax formula of isotonic regression: the maximum over the starts of a segment of
        # the minimum over its ends.
        lowest = rate.flip(2).cummin(dim=2).values.flip(2)
        slopes.append(lowest.cummax(dim=1).values.diagonal(offset=1, dim1=1, dim2=2))
    return -torch.cat(slopes).clamp(min=LEAST_RISK).log()


def above_hull(risk: Tensor, flops: Tensor, steps: Tensor) -> Tensor:
    """How much more risk than the hull of ``steps`` each mask but the first has, float32 ``[n, masks - 1]``."""
    saved = -flops.diff().clamp(max=-LEAST_SAVED).float()
    return (risk[:, 1:] - (saved * (-steps).exp()).cumsum(dim=1)).clamp(min=0)


def component_logits(steps: Tensor, against: Tensor, path: NDArray, nvec: NDArray) -> Tensor:
    """Logits ``[n, sum(nvec)]`` of a policy that takes the positive ``steps [n, masks - 1]`` of a path.

    The logit of a choice is the sum of the steps that lead to it; that of running is 0. ``against [n, masks - 1]`` are
    log-odds against stopping at a mask, for components with several choices.
    """
    first = first_columns(nvec)
    leads, bad = torch.zeros(2, steps.shape[1], int(nvec.sum()))
    for step, raised in enumerate(path_steps(path)):
        for component in raised:
            choice, start = path[step + 1, component], first[component]
            leads[step, start + choice : start + nvec[component]] = 1
            bad[step, start + choice] = float(nvec[component] > 2)
    return steps @ leads - against @ bad
