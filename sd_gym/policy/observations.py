"""Observations of a batch: arrays ``[n, features]``, or a dictionary of them where a policy sees tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

Observations = NDArray | dict[str, NDArray]
TensorObservations = Tensor | dict[str, Tensor]
Batch = TypeVar("Batch", bound=Observations | TensorObservations)


@overload
def to_tensors(observations: NDArray | Tensor, device: torch.device | str = "cpu") -> Tensor: ...
@overload
def to_tensors(observations: dict[str, NDArray], device: torch.device | str = "cpu") -> dict[str, Tensor]: ...
def to_tensors(observations: Observations | Tensor, device: torch.device | str = "cpu") -> TensorObservations:
    """Observations for a policy: float32, on its device."""
    return _each(lambda _, values: torch.as_tensor(values, dtype=torch.float32, device=device), observations)


def select_rows(observations: Batch, rows: NDArray | Tensor) -> Batch:
    """Observations of some rows of a batch."""
    return _each(lambda _, values: values[rows], observations)


def blinded(observations: Batch, stages: Sequence[str]) -> Batch:
    """Observations with nothing of the input; of several stages, with the stage alone."""

    def blind(name: str, values: Any) -> Any:
        zeros = values * 0
        if name == "stage" and len(stages) > 1:
            zeros[:, : len(stages)] = values[:, : len(stages)]
        return zeros

    return _each(blind, observations)


def _each(function: Callable[[str, Any], Any], observations: Any) -> Any:
    """What a function of a name and its values makes of observations, in their structure; flat ones are the stage's."""
    if isinstance(observations, dict):
        return {name: function(name, values) for name, values in observations.items()}
    return function("stage", observations)
