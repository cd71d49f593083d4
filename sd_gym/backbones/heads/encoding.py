"""A head's inputs, targets and batches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
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

NO_MODEL_INPUTS = ("labels", "context_mask")


class Encoding(ABC):
    """Inputs and targets of one kind of output."""

    name: ClassVar[str]
    padding_side: ClassVar[Literal["left", "right"]] = "right"  # of batches
    source_options: ClassVar[dict[str, Any]] = {}  # further options for tokenising the inputs

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that encoding depends on, as plain values."""
        return {"head": self.name}

    def prompting(self, backbone: BackboneConfig) -> BackboneConfig:
        """The backbone's part of the config, without a prompt or stop that the head ignores.

        ValueError if the head needs a prompt and there is none.
        """
        return backbone.model_copy(update={"prompt": None, "stop": None})

    @abstractmethod
    def targets(
        self, instances: Sequence[Instance], source: BatchEncoding, tokenizer: Tokenizer, backbone: BackboneConfig
    ) -> Targets:
        """The targets of instances whose tokenised inputs are ``source``; see ``sd_gym.tasks.encoding.encode``."""

    def batch(self, encoded: Encoded, indices: NDArray, device: torch.device) -> dict[str, Tensor]:
        """All inputs of a pass on some instances, with ``labels``, cut to the longest of them, on ``device``."""
        inputs = encoded.inputs(indices, device, padding_side=self.padding_side)
        return inputs | {name: value.to(device) for name, value in self._further_inputs(encoded, indices).items()}

    def _further_inputs(self, encoded: Encoded, indices: NDArray) -> dict[str, Tensor]:
        """The inputs of a pass that the model does not read, such as ``labels``."""
        return {"labels": encoded.labels[torch.from_numpy(np.asarray(indices))]}

    def prompt_length(self, inputs: Tensor) -> int:
        """Tokens that ``generate()`` returns in front of the answer, for inputs ``[n, length]``."""
        return 1  # the decoder's start token


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model reads as its input."""
    return {name: value for name, value in batch.items() if name not in NO_MODEL_INPUTS}


def nothing_generated(labels: Tensor, **more: Tensor) -> Targets:
    """Targets of a head that generates no text."""
    return Targets(labels, np.ones(len(labels), dtype=np.int64), np.zeros(len(labels), dtype=bool), **more)
