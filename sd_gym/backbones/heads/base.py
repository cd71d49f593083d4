"""The base class of heads, and shares of FLOPs."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sd_gym.backbones.heads.answers import Answers
from sd_gym.backbones.heads.encoding import Encoding, model_inputs
from sd_gym.backbones.heads.losses import Losses
from sd_gym.switch import FlopsModel, Switchboard
from sd_gym.switch.stages import EVERY_LAYER


class Head(Encoding, Losses, Answers):
    """One kind of output: how such a model is loaded, and how its passes run.

    ``Encoding`` has the inputs and targets of a pass, ``Losses`` the losses, ``Answers`` the answers and their quality.
    A head has no weights and keeps no model; it depends only on its ``settings``.
    """

    _auto_class: ClassVar[str]  # the class of ``transformers`` that loads such a model
    _stored_as: ClassVar[tuple[str, ...]]  # parts of the names of the model classes that have it

    @classmethod
    @abstractmethod
    def of_model(cls, model: PreTrainedModel) -> Self | None:
        """The head of a model; ``None`` if it has no such head. Earlier ones in ``HEADS`` are asked first."""

    @classmethod
    def is_stored(cls, config: PretrainedConfig, architectures: Sequence[str]) -> bool:
        """Whether a model was saved with such a head. Earlier ones in ``HEADS`` are asked first."""
        return any(part in name for name in architectures for part in cls._stored_as)

    @classmethod
    def loading(cls, config: PretrainedConfig) -> tuple[str, dict[str, Any]]:
        """The class of ``transformers`` that loads such a model, and further arguments for it.

        BackboneError if the architecture has no such head.
        """
        return cls._auto_class, {}

    def forward(self, board: Switchboard, batch: dict[str, Tensor], call: Callable[..., Any] | None = None) -> Tensor:
        """Logits of one forward pass under the decisions in force, teacher-forced where texts are generated.

        They are ``[batch, target length, vocabulary]``, ``[batch, classes]``, or ``[batch, 2, length]`` (starts and
        ends). ``call`` replaces the model: a wrapper of it, or a plain module of one mask.
        """
        return (call or board.model)(**model_inputs(batch)).logits

    def kept(self, batch: dict[str, Tensor], keep: NDArray | Tensor) -> NDArray | Tensor:
        """The tokens that a pass keeps if the input keeps ``keep [batch, length]``; ``batch`` is adjusted in place."""
        return keep

    def resume_points(self, board: Switchboard) -> list[int]:
        """Indices of the switches from which a pass that has answered can be run again, ascending."""
        return [columns.start for columns in board.decided_at([EVERY_LAYER]).values()]

    def can_exit(self, board: Switchboard) -> bool:
        """Whether it can classify the output of any layer: only with a single stack, an encoder or a decoder."""
        return self.confidence is not None and len(board.architecture.stacks) == 1

    def lengths(self, source: NDArray, target: NDArray, kept: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """The arguments of ``FlopsModel.costs`` for a pass on inputs and answers of so many tokens, int ``[n]``.

        ``kept``: tokens of the input that are not dropped.
        """
        return source, source, kept  # a decoder that classifies after an encoder reads the input again

    def positions(self, source: int, target: int) -> dict[str, int]:
        """Positions that the model needs for the longest input and target, by config key."""
        return {"max_source_length": source}


def reading_ratio(
    head: Head, flops: FlopsModel, source: NDArray, kept: NDArray, skip: NDArray, ranking: NDArray
) -> NDArray:
    """FLOPs of reading inputs (and generating one token, if texts are generated) over the dense ones, float64 ``[n]``.

    ``source`` are the tokens of each input, ``kept`` those that are not dropped, ``ranking`` the FLOPs of ranking them,
    each int ``[n]``. ``skip`` is ``[n, switches]``, 1 = skipped.
    """
    target = np.ones_like(source)
    always, switched = flops.costs(*head.lengths(source, target, kept))
    dense_always, dense = flops.costs(*head.lengths(source, target, source))
    ran = always + (switched * (1 - np.asarray(skip, dtype=np.int64))).sum(axis=1)
    return flops_share(ran + ranking, dense_always + dense.sum(axis=1))


def flops_share(ran: NDArray, dense: NDArray) -> NDArray:
    """FLOPs over dense FLOPs, float64 ``[n]``; 1.0 where the dense FLOPs are 0, as on padding alone."""
    return np.divide(ran, dense, out=np.ones(len(ran)), where=dense > 0)
