"""What a head does before a pass: inputs, targets and batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded, Targets
from sd_gym.data.instance import Instance

Tokenize = Callable[..., tuple[BatchEncoding, NDArray]]
NO_MODEL_INPUTS = ("labels", "context_mask")


class Encoding(ABC):
    """Inputs and targets of one kind of output."""

    name: ClassVar[str]  # what the head is called
    padding_side: ClassVar[Literal["left", "right"]] = "right"  # where batches are padded
    _source_options: ClassVar[dict[str, Any]] = {}  # further ones for tokenizing the inputs

    @property
    def settings(self) -> dict[str, Any]:
        """What encoding depends on, as JSON takes it."""
        return {"head": self.name}

    def prompting(self, backbone: BackboneConfig) -> BackboneConfig:
        """The backbone's part of the config, with what prompt and stop the head uses; ValueError if it lacks one."""
        return backbone.model_copy(update={"prompt": None, "stop": None})

    def encode(
        self, instances: Sequence[Instance], tokenize: Tokenize, tokenizer: Tokenizer, backbone: BackboneConfig
    ) -> tuple[BatchEncoding, NDArray, Targets]:
        """The inputs of instances, which of them were cut, bool ``[n]``, and the targets.

        ``tokenize`` gives the first two, and takes further options of the tokenizer.
        """
        source, cut = tokenize(**self._source_options)
        return source, cut, self._targets(instances, source, tokenizer, backbone)

    @abstractmethod
    def _targets(
        self, instances: Sequence[Instance], source: BatchEncoding, tokenizer: Tokenizer, backbone: BackboneConfig
    ) -> Targets:
        """The targets of instances whose tokenised inputs are ``source``; see ``sd_gym.tasks.encoding.encode``."""

    def batch(self, encoded: Encoded, indices: NDArray, device: torch.device) -> dict[str, Tensor]:
        """Everything that a pass needs of some instances, cut to the longest of them, on ``device``."""
        inputs = encoded.inputs(indices, device, padding_side=self.padding_side)
        return inputs | {name: value.to(device) for name, value in self._beside(encoded, indices).items()}

    def _beside(self, encoded: Encoded, indices: NDArray) -> dict[str, Tensor]:
        """What a pass needs beside the model's inputs."""
        return {"labels": encoded.labels[torch.from_numpy(np.asarray(indices))]}

    def prompt_length(self, inputs: Tensor) -> int:
        """Tokens that ``generate()`` returns in front of the answer, for inputs ``[n, length]``."""
        return 1  # what a decoder starts with


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model reads to represent its input."""
    return {name: value for name, value in batch.items() if name not in NO_MODEL_INPUTS}


def nothing_generated(labels: Tensor, **more: Tensor) -> Targets:
    """Targets that are no texts."""
    return Targets(labels, np.ones(len(labels), dtype=np.int64), np.zeros(len(labels), dtype=bool), **more)
