"""The dynamic barrier: how much the gradient of the quality loss weighs against that of the FLOPs.

Gong, Liu and Liu, "Bi-objective Trade-off with Dynamic Barrier Gradient Descent" (NeurIPS 2021). To minimise f under a
constraint on q, step along ``grad f + lambda * grad q`` with the least ``lambda >= 0`` by which q falls at the rate
``phi``:

    lambda = max(0, (phi - <grad f, grad q>) / |grad q|^2)

* ``constrained`` (q <= limit): ``phi = min(alpha * (q - limit), beta * |grad q|^2)``, so that below its limit q may
  rise;
* ``lexicographic`` (q minimal, then f): ``phi = beta * |grad q|^2``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

TINY = 1e-12
FLOOR = 0.1  # least |grad q|^2, as a share of its noisy estimate; bounds lambda


class Weight(NamedTuple):
    """The barrier's multiplier at one step, and its inputs."""

    multiplier: float  # lambda
    phi: float  # the rate at which q has to fall
    norm_f: float  # estimate of |grad f|
    norm_q: float  # estimate of |grad q|
    cosine: float  # estimate of the cosine of the two gradients


@dataclass(eq=False)
class DynamicBarrier:
    """Weighs two noisy gradients.

    The squared norm of a noisy gradient is too large by the noise's variance, which makes lambda too small. So inner
    products are those between two independent halves of a batch, where the noise has mean zero, averaged over steps.
    """

    control: Literal["constrained", "lexicographic"]
    limit: float = 0.0  # of q, if it is constrained
    alpha: float = 1.0  # how fast a violated constraint is restored
    beta: float = 1.0  # highest rate at which q falls, in units of its own gradient descent
    highest: float = 100.0  # cap of lambda
    memory: float = 0.0  # decay of the running averages per step; 0: only this step counts
    _total: float = field(default=0.0, init=False)  # weight of the averages
    # Averages of q; of |grad f|^2, |grad q|^2 and <grad f, grad q> across halves; of |mean of both halves of grad q|^2.
    _means: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64), init=False)

    def weigh(self, q: float, f_halves: tuple[Tensor, Tensor], q_halves: tuple[Tensor, Tensor]) -> Weight:
        """Lambda for this step; each gradient ``[parameters]`` is given by two independent estimates."""
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
        return {"total": self._total, "means": self._means.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state``."""
        self._total = state["total"]
        self._means = state["means"].clone()
