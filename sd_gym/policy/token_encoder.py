"""A small network that reads the tokens of a text in order, for policies that observe tokens."""

import numpy as np
import torch
from torch import Tensor, nn

CHANNELS = 48
KERNEL_SIZE = 3  # consecutive tokens in one step of the convolution
LEAST_FEATURE_DEVIATION = 1e-3  # features that vary less are not scaled
FLOPS_SHARE = 0.01  # highest FLOPs of the convolution, over dense FLOPs


class TokenEncoder(nn.Module):
    """Features of a text: mean and maximum of a convolution over its tokens, and the text's length.

    Unlike mean and maximum of the tokens, they depend on the tokens' order (Kim 2014, section 2). Before training they
    hardly differ between texts, so ``standardise_on`` standardises them (Salimans and Kingma 2016, section 3).

    Args:
        width: Numbers per token.
        channels: Channels of the convolution.
        stage_size: With several stages, size of the stage's own observation, which begins the features.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, channels: int = CHANNELS, stage_size: int = 0) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, channels, KERNEL_SIZE, padding=KERNEL_SIZE // 2)
        size = 2 * channels + 1
        self.stage_size = stage_size
        self.size = stage_size + size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Standardised features ``[n, size]``; zeros for a text without tokens.

        Observations are ``tokens [n, length, width]``, zeros after the text, and ``mask [n, length]``. With several
        stages they also have ``stage [n * stages, stage_size]``, those of the same text one after the other; then there
        are as many rows of features.
        """
        count = observations["mask"].sum(dim=1, keepdim=True)
        features = (self._read(observations) - self.mean) / self.deviation * (count > 0)
        if not self.stage_size:
            return features
        stage = observations["stage"]
        return torch.cat([stage, features.repeat_interleave(len(stage) // len(features), dim=0)], dim=1)

    def _read(self, observations: dict[str, Tensor]) -> Tensor:
        tokens, mask = observations["tokens"], observations["mask"]
        longest = max(1, int(mask.any(dim=0).sum()))  # padding that all rows share is not read
        return self.read(tokens[:, :longest], mask[:, :longest])

    def read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Features ``[n, size - stage_size]`` before standardising; arguments as of ``forward``."""
        count = mask.sum(dim=1, keepdim=True)
        values = self.convolution(tokens.transpose(1, 2)).relu() * mask[:, None].float()
        mean = values.sum(dim=2) / count.clamp(min=1)
        return torch.cat([mean, values.amax(dim=2), count.float().log1p()], dim=1)

    @torch.no_grad()
    def standardise_on(self, observations: dict[str, Tensor]) -> None:
        """Set the mean and deviation of features to those of these texts; observations as of ``forward``."""
        features = self._read(observations)
        deviation = features.std(dim=0, correction=0)
        self.mean.copy_(features.mean(dim=0))
        self.deviation.copy_(torch.where(deviation > LEAST_FEATURE_DEVIATION, deviation, 1.0))


def flops_per_token(width: int, channels: int) -> int:
    """FLOPs of ``TokenEncoder`` per token of a text, 2 per multiply-add."""
    return 2 * KERNEL_SIZE * width * channels


def affordable_channels(width: int, dense_flops: float, stages: int = 1) -> int:
    """Most channels (1 to ``CHANNELS``) that cost at most ``FLOPS_SHARE`` of the ``dense_flops`` per token."""
    return int(np.clip(FLOPS_SHARE * dense_flops / (stages * flops_per_token(width, 1)), 1, CHANNELS))
