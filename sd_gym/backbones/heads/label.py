"""A class of the whole input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.heads.answers import CHOICE, QualityMeasure, SplitData, judged_choice, log_likelihoods
from sd_gym.backbones.heads.base import Head
from sd_gym.backbones.heads.encoding import nothing_generated
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Targets
from sd_gym.data.instance import Instance
from sd_gym.errors import DataError, short


class LabelHead(Head):
    """Logits ``[batch, classes]``; labels are class indices, int64 ``[batch]``.

    Its batches are padded at the right. A model that pools the first position, as BERT does, pools that position
    whatever the mask says: given inputs that are padded at the left it pools padding, with a policy as without.
    ``names``: name of each class index, if not the inverse of ``label2id``.
    """

    name = "label"
    gives = "label"
    _auto_class = "AutoModelForSequenceClassification"
    _stored_as = ("ForSequenceClassification",)

    def __init__(self, label2id: Mapping[str, int], names: Mapping[int, str] | None = None) -> None:
        self.label2id = dict(label2id)
        self._names = names or {index: name for name, index in self.label2id.items()}

    @classmethod
    def _of(cls, model: PreTrainedModel) -> Self | None:
        """Of any model that neither generates nor extracts, with the names of its classes."""
        names = model.config.id2label or {}
        return cls(labels_of(model.config), {int(index): str(name) for index, name in names.items()})

    @classmethod
    def _is_stored(cls, config: PretrainedConfig, architectures: Sequence[str]) -> bool:
        """By the model's class and its number of outputs."""
        return super()._is_stored(config, architectures) and cls._has_outputs(len(labels_of(config)))

    @classmethod
    def _has_outputs(cls, count: int) -> bool:
        return count != 1

    @property
    def settings(self) -> dict[str, Any]:
        """With the names of the classes."""
        return {**super().settings, "label2id": self.label2id}

    def _targets(
        self, instances: Sequence[Instance], source: BatchEncoding, tokenizer: Tokenizer, backbone: BackboneConfig
    ) -> Targets:
        """The classes' indices; DataError if a label is not one of the backbone's classes."""
        return nothing_generated(self._labels(instances))

    def _labels(self, instances: Sequence[Instance]) -> Tensor:
        return torch.tensor([class_index(instance, self.label2id) for instance in instances])

    @property
    def _learned_as(self) -> QualityMeasure:
        """By the accuracy."""
        return QualityMeasure(self.exact, name="accuracy")

    def exact(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """1.0 where the most probable class is the right one."""
        return (self.prediction(logits) == labels).float()

    def likelihood(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """The probability of the right class."""
        return log_likelihoods(logits[:, None], labels[:, None])[:, 0].exp()

    def prediction(self, logits: Tensor) -> Tensor:
        """The most probable class, int64 ``[batch]``."""
        return logits.argmax(dim=1)

    @property
    def confidence(self) -> Callable[[Tensor], Tensor] | None:
        """The highest class probability."""
        return lambda logits: logits.float().softmax(dim=-1).amax(dim=-1)

    judgement = CHOICE

    def judge(self, logits: Tensor) -> Tensor:
        """Of the class."""
        return judged_choice(logits)

    def _said(self, split: SplitData, rows: NDArray, values: NDArray) -> list[str]:
        """The classes' names."""
        return [self._in_words(value) for value in values.ravel()]

    def reference(self, instance: Instance, labels: Tensor) -> str:
        """The right class's name."""
        return self._in_words(labels.item())

    def _in_words(self, value: float) -> str:
        return self._names[int(value)]


def labels_of(config: PretrainedConfig) -> dict[str, int]:
    """Class index of each class's name in a model's configuration."""
    return {str(name): int(index) for name, index in (config.label2id or {}).items()}


def class_index(instance: Instance, label2id: Mapping[str, int]) -> int:
    """The class index of an instance's label; DataError if the label is not one of the classes."""
    target = instance.target
    if str(target) in label2id:  # a number that is a class's name is that class
        return label2id[str(target)]
    if isinstance(target, int) and target < len(label2id):
        return target
    raise DataError(
        f"{instance.place}: label {short(target)} is none of the backbone's {len(label2id)} classes: "
        f"{', '.join([*label2id][:20])}{' ...' if len(label2id) > 20 else ''}"
    )
