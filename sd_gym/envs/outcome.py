"""What came of decisions."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray


@dataclass(frozen=True)
class Outcome:
    """What came of some decisions; every field has one row an instance.

    Attributes:
        quality: Task quality under the decision, float64 ``[n]``.
        quality_ref: Task quality of the dense backbone, float64 ``[n]``.
        cost: ``max(0, quality_ref - epsilon - quality)``, float64 ``[n]``.
        flops_ratio: FLOPs under the decision over dense FLOPs, float64 ``[n]``.
    """

    quality: NDArray
    quality_ref: NDArray
    cost: NDArray
    flops_ratio: NDArray
