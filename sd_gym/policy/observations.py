"""Observations of a batch: an array ``[n, features]``, or a dictionary of arrays if a policy observes tokens."""

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
    """Observations as float32 tensors on a device."""
    return _each(lambda _, values: torch.as_tensor(values, dtype=torch.float32, device=device), observations)


def select_rows(observations: Batch, rows: NDArray | Tensor) -> Batch:
    """Observations of some rows of a batch."""
    return _each(lambda _, values: values[rows], observations)


def blinded(observations: Batch, stages: Sequence[str]) -> Batch:
    """Observations with zeros instead of the input; with several stages, only the stage stays."""

    def blind(name: str, values: Any) -> Any:
        zeros = values * 0
        if name == "stage" and len(stages) > 1:
            zeros[:, : len(stages)] = values[:, : len(stages)]
        return zeros

    return _each(blind, observations)


def _each(function: Callable[[str, Any], Any], observations: Any) -> Any:
    """Apply a function of name and values to each part of observations; a flat array has the name ``stage``."""
    if isinstance(observations, dict):
        return {name: function(name, values) for name, values in observations.items()}
    return function("stage", observations)
