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


def tokens_of(hidden: Tensor, mask: Tensor, mean: NDArray, deviation: NDArray, length: int) -> dict[str, NDArray]:
    """What ``Eyes`` see of texts: their tokens in order, standardised, and which of them are there.

    Args:
        hidden: The first layer's input, ``[n, longest, width]``, padded at the right.
        mask: Of its tokens, ``[n, longest]``.
        mean: Of each channel over the tokens of the training split, ``[width]``.
        deviation: Likewise.
        length: Tokens of a row: others are padded with zeros or, where a prompt is a little longer, cut.

    Returns:
        ``tokens``, float32 ``[n, length, width]``, and ``mask``, int8 ``[n, length]``.
    """
    seen, present = hidden[:, :length].float().cpu().numpy(), mask[:, :length].bool().cpu().numpy()
    tokens = np.zeros((len(seen), length, len(mean)), dtype=np.float32)
    tokens[:, : seen.shape[1]] = np.where(present[:, :, None], standardised(seen, mean, deviation), 0)
    return {"mask": np.pad(present, ((0, 0), (0, length - present.shape[1]))).astype(np.int8), "tokens": tokens}


def standardised(features: NDArray, mean: NDArray, deviation: NDArray) -> NDArray:
    """Features ``[n, ...]`` by their mean and deviation on the training split, each within ``LIMIT``."""
    return np.clip((features - mean) / deviation, -LIMIT, LIMIT)
