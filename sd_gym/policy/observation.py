"""What a policy sees of an input before it decides."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.switch import Switchboard, first_layer_input, pooled

LIMIT = 10.0  # of a standardised feature


def observed(board: Switchboard, inputs: dict[str, Tensor]) -> Tensor:
    """Mean and maximum of the first layer's input over the tokens, the length and its logarithm: not standardised.

    Args:
        board: The backbone's switchboard.
        inputs: The model's inputs, ``attention_mask`` among them.

    Returns:
        ``[batch, 2 * width + 2]``, on the model's device.
    """
    return features_of(first_layer_input(board, inputs), inputs["attention_mask"])


def features_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """As ``observed``, of the first layer's input ``[batch, length, width]`` and the mask of its tokens."""
    length = mask.sum(dim=1, keepdim=True).float()
    return torch.cat([pooled(hidden, mask), length, length.log()], dim=1)


def standardised(features: NDArray, mean: NDArray, deviation: NDArray) -> NDArray:
    """Features ``[n, ...]`` by their mean and deviation on the training split, each within ``LIMIT``."""
    return np.clip((features - mean) / deviation, -LIMIT, LIMIT)
