"""Observations of an input before the first layer, and of a pass at a stage."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.projection import standardised
from sd_gym.switch import Switchboard, first_layer_input, pooled

HIGHEST_PROBABILITY = 1 - 1e-6


def input_features(board: Switchboard, inputs: dict[str, Tensor]) -> Tensor:
    """``pooled_features`` of the first layer's input, for inputs of the model with their ``attention_mask``."""
    return pooled_features(first_layer_input(board, inputs), inputs["attention_mask"])


def pooled_features(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean and maximum of ``hidden [n, length, width]``, the length and its logarithm: ``[n, 2 * width + 2]``.

    They are not standardised, and float32 whatever the model computes in. ``mask [n, length]``: which tokens are not
    padding; ``None``: all.
    """
    hidden = hidden.float()
    if mask is None:
        return torch.cat([pooled(hidden, None), _length_features(hidden.shape[1], len(hidden), hidden.device)], dim=1)
    mask = mask.to(hidden.device)
    length = mask.sum(dim=1, keepdim=True).float()
    return torch.cat([pooled(hidden, mask), length, length.log()], dim=1)


@lru_cache(maxsize=1024)
def _length_features(length: int, rows: int, device: torch.device) -> Tensor:
    """A length and its logarithm, ``[rows, 2]``; cached, as computing them is slow beside a small backbone."""
    with torch.inference_mode(False):
        lengths = torch.full((rows, 1), float(length), device=device)
        return torch.cat([lengths, lengths.log()], dim=1)


def token_observations(
    hidden: Tensor, mask: Tensor, mean: NDArray, deviation: NDArray, length: int
) -> dict[str, NDArray]:
    """The input of a ``TokenEncoder``: standardised ``tokens``, float32 ``[n, length, width]``, and their ``mask``.

    The mask is int8 ``[n, length]``. Shorter rows are padded with zeros, longer prompts cut. ``hidden [n, longest,
    width]`` is the first layer's input and ``mask`` that of its tokens, both padded at the right. Mean and deviation
    ``[width]`` are those of the training split's tokens.
    """
    values, present = hidden[:, :length].float().cpu().numpy(), mask[:, :length].bool().cpu().numpy()
    tokens = np.zeros((len(values), length, len(mean)), dtype=np.float32)
    tokens[:, : values.shape[1]] = np.where(present[:, :, None], standardised(values, mean, deviation), 0)
    return {"mask": np.pad(present, ((0, 0), (0, length - present.shape[1]))).astype(np.int8), "tokens": tokens}


def stage_observation(number: int, share: NDArray, features: NDArray, mean: NDArray, deviation: NDArray) -> NDArray:
    """The observation of a pass at the stage with index ``number``, float32 ``[n, stages + 1 + features]``.

    ``share [n]`` of the dense FLOPs is spent if all the rest is skipped. ``features [n, features]`` are standardised
    here, by mean and deviation ``[stages, features]`` of the training split.
    """
    progress = np.zeros((len(features), len(mean) + 1), dtype=np.float32)
    progress[:, number], progress[:, -1] = 1, share
    return np.concatenate([progress, standardised(features, mean[number], deviation[number])], axis=1)


def log_odds(probability: NDArray) -> NDArray:
    """Log-odds of probabilities ``[n]``, which are clipped at 1 - 1e-6: float64 ``[n]``."""
    probability = np.minimum(probability, HIGHEST_PROBABILITY)
    return np.log(probability / (1 - probability))
