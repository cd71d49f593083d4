"""Observations of a batch: arrays ``[n, features]``, or a dictionary of them where a policy sees tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

Batch = TypeVar("Batch", Tensor, NDArray, dict[str, Tensor], dict[str, NDArray])


def tensors(
    observations: NDArray | dict[str, NDArray], device: torch.device | str = "cpu"
) -> Tensor | dict[str, Tensor]:
    """Observations for a policy: float32, on its device."""
    if isinstance(observations, dict):
        return {name: tensors(values, device) for name, values in observations.items()}
    return torch.as_tensor(observations, dtype=torch.float32, device=device)


def rows_of(observations: Batch, rows: NDArray | Tensor) -> Batch:
    """Observations of some rows of a batch."""
    if isinstance(observations, dict):
        return {name: values[rows] for name, values in observations.items()}
    return observations[rows]


def blinded(observations: Batch, stages: Sequence[str]) -> Batch:
    """Observations with nothing of the input; of several stages, with the stage alone."""
    if isinstance(observations, dict):
        told = {"stage": stages}  # the tokens tell nothing but the text
        return {name: blinded(values, told.get(name, ["first"])) for name, values in observations.items()}
    zeros = observations * 0
    if len(stages) > 1:
        zeros[:, : len(stages)] = observations[:, : len(stages)]
    return zeros
