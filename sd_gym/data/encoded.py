"""A split of instances as padded tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The reference answers; see the fields of ``Encoded``."""

    labels: Tensor
    target_length: NDArray
    target_cut: NDArray
    context_mask: Tensor | None = None
    offsets: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """A whole split as padded tensors, from which batches are taken.

    Attributes:
        input_ids: int64 ``[n, longest source]``, padded at the right.
        source_length: int64 ``[n]``, tokens of each input.
        labels: ``[n, ...]``, in the form of the backbone's head.
        target_length: int64 ``[n]``, tokens of each target; 1 where nothing is generated.
        source_cut: bool ``[n]``, whether the input was longer than the limit and was truncated.
        target_cut: bool ``[n]``, whether the target was truncated. For extracted answers: whether all right answers
            were in the truncated part; then there is no label, the likelihood is 0, and training ignores the instance.
        token_type_ids: int64 ``[n, longest source]`` for sentence pairs, otherwise ``None``.
        context_mask: bool ``[n, longest source]`` for extracted answers: which tokens they may contain.
        offsets: int32 ``[n, longest source, 2]`` for extracted answers: start and end character of each token.
    """

    input_ids: Tensor
    source_length: NDArray
    labels: Tensor
    target_length: NDArray
    source_cut: NDArray
    target_cut: NDArray
    token_type_ids: Tensor | None = None
    context_mask: Tensor | None = None
    offsets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of instances, and of truncated inputs and targets."""
        return {
            "instances": len(self),
            "cut_inputs": int(self.source_cut.sum()),
            "cut_targets": int(self.target_cut.sum()),
        }

    def inputs(self, indices: NDArray, device: torch.device, *, padding_side: str = "right") -> dict[str, Tensor]:
        """The model's inputs ``[m, length]`` of some instances on ``device``; padded to the longest of them."""
        rows = torch.from_numpy(np.asarray(indices))
        length = torch.from_numpy(self.source_length[indices])[:, None]
        longest = int(length.max())
        present = torch.arange(longest) < length
        input_ids = self.input_ids[rows, :longest]
        if padding_side == "left":
            input_ids, present = left_padded(input_ids, length), present.flip(1)
        inputs = {"input_ids": input_ids, "attention_mask": present.long()}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids[rows, :longest]
        return {key: value.to(device) for key, value in inputs.items()}

    def part(self, indices: NDArray) -> Encoded:
        """The instances with these indices, ``[m]``."""
        return replace(self, **{name: value[indices] for name, value in vars(self).items() if value is not None})


def left_padded(values: Tensor, length: Tensor) -> Tensor:
    """Move the padding of ``values [n, longest]`` from the right to the left; ``length`` is ``[n, 1]``."""
    longest = values.shape[1]
    return values.gather(1, (torch.arange(longest) - longest + length) % longest)
