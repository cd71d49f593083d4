"""A split of instances as padded tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The right answers; see the fields of ``Encoded``."""

    labels: Tensor
    target_length: NDArray
    target_cut: NDArray
    context_mask: Tensor | None = None
    offsets: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """A whole split as padded tensors; batches are cut out of it.

    Attributes:
        input_ids: int64 ``[n, longest source]``, padded at the right.
        source_length: int64 ``[n]``, tokens of each input.
        labels: ``[n, ...]``, in the form of the backbone's head.
        target_length: int64 ``[n]``, tokens of each target; 1 where nothing is generated.
        source_cut: bool ``[n]``, whether the input was longer than the limit.
        target_cut: bool ``[n]``, whether the target was. Where answers are extracted, whether all right ones stood in
            what was cut off; then there is no label, the likelihood is 0, and training ignores it.
        token_type_ids: int64 ``[n, longest source]`` for sentence pairs, else ``None``.
        context_mask: bool ``[n, longest source]`` where answers are extracted, else ``None``: where they may stand.
        offsets: int32 ``[n, longest source, 2]`` where answers are extracted: characters of each token.
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
        """How many instances there are, and how many of their inputs and targets were cut."""
        return {
            "instances": len(self),
            "cut_inputs": int(self.source_cut.sum()),
            "cut_targets": int(self.target_cut.sum()),
        }

    def inputs(self, indices: NDArray, device: torch.device, *, padding_side: str = "right") -> dict[str, Tensor]:
        """The model's inputs of some instances, cut to the longest of them, on ``device``."""
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
        """Some instances alone, ``[m]``."""
        return replace(self, **{name: value[indices] for name, value in vars(self).items() if value is not None})


def left_padded(values: Tensor, length: Tensor) -> Tensor:
    """``values [n, longest]``, padded at the right, with the padding at the left; ``length`` is ``[n, 1]``."""
    longest = values.shape[1]
    return values.gather(1, (torch.arange(longest) - longest + length) % longest)
