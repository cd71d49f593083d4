"""A split of instances as padded tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The reference answers of a split.

    An extracted answer that was cut off has no label: its likelihood is 0, and training ignores the instance.
    """

    labels: Tensor  # ``[n, ...]``, in the form of the backbone's head
    target_length: NDArray  # int64 ``[n]``, tokens of each target; 1 where nothing is generated
    target_cut: NDArray  # bool ``[n]``, whether the target, or all extracted answers, were cut off
    context_mask: Tensor | None = None  # bool ``[n, longest source]``: tokens that extracted answers may contain
    offsets: Tensor | None = None  # int32 ``[n, longest source, 2]``: characters of each token, for extracted answers


@dataclass(frozen=True, kw_only=True)
class Encoded(Targets):
    """A whole split as padded tensors, from which batches are taken."""

    input_ids: Tensor  # int64 ``[n, longest source]``, padded at the right
    source_length: NDArray  # int64 ``[n]``, tokens of each input
    source_cut: NDArray  # bool ``[n]``, whether the input was longer than the limit and was truncated
    token_type_ids: Tensor | None = None  # int64 ``[n, longest source]`` for sentence pairs

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
