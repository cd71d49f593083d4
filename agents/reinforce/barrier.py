"""The dynamic barrier: how much the gradient of the quality loss weighs against that of the FLOPs.

Gong, Liu and Liu, "Bi-objective Trade-off with Dynamic Barrier Gradient Descent" (NeurIPS 2021). To minimise f first of
all under q, step along ``grad f + lambda * grad q`` with the least ``lambda >= 0`` by which q falls at the rate
``phi``:

    lambda = max(0, (phi - <grad f, grad q>) / |grad q|^2)

* ``constrained`` (q <= limit): ``phi = min(alpha * (q - limit), beta * |grad q|^2)``, so that below its limit q may
  rise;
* ``lexicographic`` (q as low as can be, then f): ``phi = beta * |grad q|^2``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

TINY = 1e-12
FLOOR = 0.1  # |grad q|^2 is taken to be at least this share of what the noisy gradient says: the guard on lambda


class Weight(NamedTuple):
    """The barrier's multiplier at one step, and what it is computed from.

    Attributes:
        multiplier: lambda.
        phi: The rate at which q shall fall.
        norm_f: Estimate of ``|grad f|``.
        norm_q: Estimate of ``|grad q|``.
        cosine: Estimate of the cosine of the two gradients.
    """

    multiplier: float
    phi: float
    norm_f: float
    norm_q: float
    cosine: float


class DynamicBarrier:
    """Weighs two gradients that are only known as noisy estimates.

    The squared norm of a noisy gradient is too large by the noise's variance, and lambda with it too small. So inner
    products are taken between two independent halves of a batch, where the noise has mean zero, and averaged over
    steps.

    Args:
        control: ``constrained`` or ``lexicographic``.
        limit: Of q, where it is constrained.
        alpha: How fast a violated constraint is restored.
        beta: How fast q falls at most, in units of its own gradient descent.
        highest: Cap of lambda.
        memory: How much of the running averages stays at each step; 0: only this step counts.
    """

    def __init__(
        self,
        control: Literal["constrained", "lexicographic"],
        *,
        limit: float = 0.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        highest: float = 100.0,
        memory: float = 0.0,
    ) -> None:
        self.control, self.limit, self.alpha, self.beta = control, limit, alpha, beta
        self.highest, self.memory = highest, memory
        self._total = 0.0  # total weight of the averages
        # q, |grad f|^2, |grad q|^2 and <grad f, grad q> across halves, and |grad q|^2 as the noisy gradient has it
        self._means = torch.zeros(5, dtype=torch.float64)

    def weigh(self, q: float, f_halves: tuple[Tensor, Tensor], q_halves: tuple[Tensor, Tensor]) -> Weight:
        """Lambda for this step.

        Args:
            q: Estimate of q.
            f_halves: Two independent estimates of grad f, each ``[parameters]``.
            q_halves: Two of grad q.
        """
        (f1, f2), (q1, q2) = f_halves, q_halves
        mean = (q1 + q2) / 2
        products = torch.stack([f1 @ f2, q1 @ q2, (f1 @ q2 + f2 @ q1) / 2, mean @ mean]).double().cpu()
        now = torch.cat([torch.tensor([q], dtype=torch.float64), products])
        self._total = self.memory * self._total + 1
        self._means += (now - self._means) / self._total
        mean_q, ff, qq, fq, noisy = self._means.tolist()
        ff, qq = max(ff, 0.0), max(qq, FLOOR * noisy)
        phi = self.beta * qq
        if self.control == "constrained":
            phi = min(self.alpha * (mean_q - self.limit), phi)
        multiplier = min(self.highest, max(0.0, (phi - fq) / (qq + TINY)))
        return Weight(multiplier, phi, ff**0.5, qq**0.5, fq / ((ff * qq) ** 0.5 + TINY))

    def state(self) -> dict[str, Any]:
        """The running averages."""
        return {"seen": self._total, "means": self._means.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._total, self._means = state["seen"], state["means"].clone()
