"""A policy that was trained on a table, for the original env."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.going_on import ANSWER
from sd_gym.policy.network import DecisionPolicy
from sd_gym.policy.observations import Observations
from sd_gym.projection import Projection

MASKS, PROJECTION = "masks", "projection."  # names of tensors


@dataclass(frozen=True, eq=False)
class TablePolicy:
    """Decides on observations of the original env as its network does on those of the table.

    Raises:
        ValueError: If masks or projection do not fit the network.
    """

    network: DecisionPolicy  # trained on the table
    nvec: list[int]  # sizes of the components of the env's decision
    switches: list[str]  # names of the switches
    # The env's decision for each of the table's, int64 ``[decisions, components]``; ``None``: they are the same.
    masks: NDArray | None
    projection: Projection | None  # how the table reduced the observations; ``None``: not at all
    channels: ClassVar[None] = None  # a table has no tokens
    token_width: ClassVar[None] = None
    flops_per_token: ClassVar[int] = 0

    def __post_init__(self) -> None:
        masks = self.masks
        projection = self.projection
        size = self.network.observation_size
        if masks is None and (self.nvec, self.switches) != (self.network.nvec, self.network.switches):
            raise ValueError("expected masks, as the network does not decide on the switches")
        if masks is not None:
            expected = math.prod(self.network.nvec), len(self.nvec)
            answers = self.stages[-1] == ANSWER
            if masks.shape != expected or masks.dtype != np.int64 or len(self.switches) + 1 + answers != expected[1]:
                raise ValueError(f"expected masks of shape {expected}, got {masks.dtype} of shape {masks.shape}")
            if (masks < 0).any() or (masks >= self.nvec).any():
                raise ValueError(f"expected masks with components below {self.nvec}")
        if projection is not None and (
            projection.components.shape != (size, *projection.mean.shape)
            or not all(np.isfinite(values).all() for values in projection)
        ):
            got = projection.components.shape
            raise ValueError(f"expected a projection to {size} numbers, got components of shape {got}")

    @property
    def stages(self) -> list[str]:
        """See ``DecisionPolicy``."""
        return self.network.stages

    @property
    def observation_size(self) -> int:
        """Features of an observation of the original env."""
        return self.network.observation_size if self.projection is None else len(self.projection.mean)

    @property
    def flops(self) -> int:
        """FLOPs of one decision, and of reducing the observation unless the network is blind."""
        reducing = 0 if self.projection is None or self.network.blind else len(self.stages) * self.projection.flops
        return self.network.flops + reducing

    def decide(self, observations: Observations | Tensor) -> NDArray:
        """Decisions, int64 ``[n, components]``, for observations of the original env, ``[n, features]``."""
        array = observations.cpu().numpy() if isinstance(observations, Tensor) else observations
        if self.projection is not None and not isinstance(array, dict):
            array = self.projection(array)
        decisions = self.network.decide(array)
        if self.masks is None:
            return decisions
        return self.masks[np.ravel_multi_index(tuple(decisions.T), self.network.nvec)]

    def with_margin(self, margin: float) -> TablePolicy:
        """See ``DecisionPolicy``."""
        return replace(self, network=self.network.with_margin(margin))

    def arrays(self) -> dict[str, NDArray]:
        """Masks and projection, by name."""
        arrays = {} if self.masks is None else {MASKS: self.masks}
        projection = {} if self.projection is None else self.projection._asdict()
        return arrays | {PROJECTION + name: values for name, values in projection.items()}

    @classmethod
    def of_files(cls, network: DecisionPolicy, values: dict[str, Any], tensors: dict[str, Tensor]) -> TablePolicy:
        """A policy from its network, its ``nvec`` and ``switches``, and its tensors, which are removed."""
        masks = tensors.pop(MASKS).numpy() if MASKS in tensors else None
        reduced = any(name.startswith(PROJECTION) for name in tensors)
        arrays = (tensors.pop(PROJECTION + name).numpy() for name in Projection._fields)
        return cls(network, **values, masks=masks, projection=Projection(*arrays) if reduced else None)
