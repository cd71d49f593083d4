"""Heads that score the whole input (regression)."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from sd_gym.backbones.heads.answers import QualityMeasure
from sd_gym.backbones.heads.label import LabelHead, labels_of
from sd_gym.data.instance import Instance
from sd_gym.errors import DataError, short


class ScoreHead(LabelHead):
    """A single output, ``[batch, 1]``; labels are scores, float32 ``[batch]``."""

    name = "score"
    judgement, confidence = (), None  # a score has no probability
    validated_by = ("exact_match", "score")

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self | None:
        """Any model with a single output that neither generates nor extracts."""
        return super().of_model(model) if len(labels_of(model.config)) == 1 else None

    @classmethod
    def is_stored(cls, config: PretrainedConfig, architectures: Sequence[str]) -> bool:
        """By the model's class and its single output."""
        return super().is_stored(config, architectures) and len(labels_of(config)) == 1

    def _labels(self, instances: Sequence[Instance]) -> Tensor:
        for instance in instances:
            if isinstance(instance.target, str):
                raise DataError(
                    f"{instance.place}: the backbone gives a score, but the label is {short(instance.target)}"
                )
        return torch.tensor([float(instance.target) for instance in instances])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(logits[:, 0].float(), labels)

    def distillation(self, logits: Tensor, dense_logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared distance from the dense score."""
        return F.mse_loss(logits.float(), dense_logits.detach().float())

    def counted(self, labels: Tensor) -> Tensor:
        """All rows."""
        return torch.tensor([len(labels)] * 2, device=labels.device)

    def measured_by(self, quality: str) -> QualityMeasure:
        """The quality ``likelihood`` is that of ``exact_match``, which is graded; ValueError for what needs classes."""
        if quality == "balanced":
            raise ValueError("'balanced' weighs classes, not scores")
        if quality == "agreement":
            raise ValueError("scores have neither agreement nor policy_labels=dense: two scores are hardly ever equal")
        return super().measured_by("exact_match" if quality == "likelihood" else quality)

    def exact(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """``1 - |score - label| / label_range``, at least 0; the range is from the lowest to the highest score."""
        return (1 - (self.prediction(logits).float() - labels).abs() / label_range).clamp(min=0)

    likelihood = exact

    def prediction(self, logits: Tensor) -> Tensor:
        """The score, ``[batch]``."""
        return logits[:, 0]

    def classes(self, instances: Sequence[Instance]) -> NDArray:
        """The scores."""
        return np.array([instance.target for instance in instances], dtype=float)

    def _to_text(self, value: float) -> str:
        return f"{value:.4g}"
