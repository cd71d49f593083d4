"""Policies that decide at random, the controls: drawn from a fixed seed, or from a hash of the observation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Noise = Literal["none", "random", "hash"]


def with_noise(logits: Tensor, observations: Tensor | dict[str, Tensor], noise: Noise) -> Tensor:
    """Logits ``[n, columns]`` whose argmax is drawn from their softmax; with ``none``, as they are."""
    if noise == "none":
        return logits
    uniform = _seeded(logits) if noise == "random" else _hashed(_flat(observations), logits.shape[1])
    return logits - torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6)))


def _seeded(logits: Tensor) -> Tensor:
    """Uniform noise from a fixed seed, of the logits' shape."""
    generator = torch.Generator(logits.device).manual_seed(0)
    return torch.rand(logits.shape, generator=generator, device=logits.device)


def _flat(observations: Tensor | dict[str, Tensor]) -> Tensor:
    """All numbers of observations in a row, ``[n, numbers]``; the stage's come first."""
    if not isinstance(observations, dict):
        return observations
    tokens = observations["tokens"].flatten(1)
    return torch.cat([observations["stage"], tokens], dim=1) if "stage" in observations else tokens


def _hashed(observations: Tensor, columns: int) -> Tensor:
    """Noise in [0, 1), ``[n, columns]``, that looks uniform and depends on the observation only."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(observations.shape[1], columns, generator=generator, dtype=torch.float64)
    mixed = observations.cpu().double() @ directions  # on the host, so that it is the same on every device
    return torch.frac(torch.sin(mixed) * 43758.5453).abs().to(observations)
