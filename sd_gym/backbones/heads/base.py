"""What every head can do, whatever kind of answers it gives."""

from __future__ import annotations

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
    """One kind of output: how it is loaded, and what a pass of it runs on; what else it does is in three parts.

    ``Encoding`` is what comes before a pass, ``Losses`` what is learned from it, ``Answers`` what is said after it.
    A head has no weights and keeps no model; what it knows of the model stands in its ``settings``.
    """

    _auto_class: ClassVar[str]  # the class of ``transformers`` that loads such a model
    _stored_as: ClassVar[tuple[str, ...]]  # ends of the names of the model classes that have it

    @classmethod
    @abstractmethod
    def _of(cls, model: PreTrainedModel) -> Self | None:
        """The head of a model; ``None`` if it has no such head. Those before it in ``HEADS`` come first."""

    @classmethod
    def _is_stored(cls, config: PretrainedConfig, architectures: Sequence[str]) -> bool:
        """Whether a model was saved with such a head, if with none of those before it in ``HEADS``."""
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
        ends). ``call``: what to call instead of the model (the same one, wrapped for several processes).
        """
        return (call or board.model)(**model_inputs(batch)).logits

    def kept(self, batch: dict[str, Tensor], keep: NDArray | Tensor) -> NDArray | Tensor:
        """The tokens that a pass keeps, where its inputs keep ``[batch, length]``; the batch is changed to fit."""
        return keep

    def resume_points(self, board: Switchboard) -> list[int]:
        """Numbers of the switches in front of which a pass that has answered can be taken up again, ascending."""
        return [columns.start for columns in board.decided_at([EVERY_LAYER]).values()]

    def lengths(self, source: NDArray, target: NDArray, kept: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """What ``FlopsModel.costs`` takes for a pass on inputs (or prompts) and answers of so many tokens, int ``[n]``.

        ``kept``: tokens of the input that are not dropped.
        """
        return source, source, kept  # a decoder that classifies after an encoder reads the input again

    def positions(self, source: int, target: int) -> dict[str, int]:
        """Positions that the model needs for the longest input and target, by config key."""
        return {"max_source_length": source}


def reading_ratio(
    head: Head, flops: FlopsModel, source: NDArray, kept: NDArray, skip: NDArray, ranking: NDArray
) -> NDArray:
    """FLOPs to read inputs, and to answer one token where texts are generated, over those of dense: float64 ``[n]``.

    Of ``source`` tokens ``kept`` are not dropped, and ranking them takes ``ranking`` FLOPs (each int ``[n]``); ``skip``
    is ``[n, switches]``, 1 = skipped.
    """
    one = np.ones_like(source)
    always, switched = flops.costs(*head.lengths(source, one, kept))
    dense_always, dense = flops.costs(*head.lengths(source, one, source))
    ran = always + (switched * (1 - np.asarray(skip, dtype=np.int64))).sum(axis=1)
    return flops_share(ran + ranking, dense_always + dense.sum(axis=1))


def flops_share(ran: NDArray, dense: NDArray) -> NDArray:
    """FLOPs over dense FLOPs, float64 ``[n]``; 1.0 where the dense model computes nothing, as on padding alone."""
    return np.divide(ran, dense, out=np.ones(len(ran)), where=dense > 0)
