"""The answers of a head, and their quality."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.data.encoded import Encoded
from sd_gym.data.instance import Instance

LEAST_LIKELIHOOD = 1e-13  # lower ones are raised to it before the logarithm is taken: about -30
MOST_UNSURE = -30.0  # lower limit of log-odds and log-probabilities
LEAST_LOG = -200.0  # the exponential of float32 below is 0
CHOICE = ("log_odds", "margin", "entropy")  # the names of the values of ``judged_choice``


class QualityMeasure(NamedTuple):
    """How a quality is measured."""

    # Takes logits, labels and the label range to the quality, float32 ``[batch]``; ``None``: the answer's text is
    # compared with the references.
    score: Callable[[Tensor, Tensor, float], Tensor] | None
    is_relative: bool = False  # whether it counts relative to the dense backbone's
    is_balanced: bool = False  # whether it is weighed by class

    def loss(self, values: NDArray, label_range: float) -> NDArray:
        """The loss of values ``[n]``: the negative logarithm of likelihoods, the distance of other scores from 1."""
        if self.is_relative:
            return -np.log(np.maximum(values, LEAST_LIKELIHOOD))
        return label_range * (1 - values)


class Answers(ABC):
    """Answers of one kind of output."""

    gives: ClassVar[str]  # what a task asks for: a ``label`` (or score), a ``span`` of the context, or a ``text``
    answering: ClassVar[str | None] = None  # how it answers questions, as in the config key ``answers``
    validated_by: ClassVar[tuple[str, str]]  # the quality that ``sd-gym prepare`` validates by, and its name there

    def measured_by(self, quality: str) -> QualityMeasure:
        """How a quality of the config is measured; ValueError if the head has no such quality."""
        measures = {
            "exact_match": QualityMeasure(self.exact),
            "balanced": QualityMeasure(self.exact, is_balanced=True),
            "likelihood": QualityMeasure(self.likelihood, is_relative=True),
            "metric": QualityMeasure(None),
        }
        measures["agreement"] = measures["exact_match"]  # the references are the dense answers
        return measures[quality]

    @abstractmethod
    def exact(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """Quality of each row in [0, 1], float32 ``[batch]``: 1.0 where the answer is exactly the reference."""

    @abstractmethod
    def likelihood(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """Probability of the reference, float32 ``[batch]``: a graded quality, from one teacher-forced pass."""

    def prediction(self, logits: Tensor) -> Tensor:
        """The classes or scores that a metric of a whole data set compares with the labels, ``[batch]``.

        ValueError if the answer is neither.
        """
        raise ValueError(f"this metric compares classes or scores, and the backbone gives a {self.gives}")

    def in_data_order(self, classes: NDArray, instances: Sequence[Instance]) -> NDArray:
        """Predictions or labels ``[n]`` as the data set of the instances numbers its classes."""
        return classes

    # Takes logits to the probability of the answer, ``[batch]``; ``None``: it is not known from one pass.
    confidence: Callable[[Tensor], Tensor] | None = None
    judgement: ClassVar[tuple[str, ...]] = ()  # names of the values of ``judge``, observed at the answer stage
    judges_passes: ClassVar[bool] = True  # whether answers and judgement come from one pass, not from ``generate()``

    def judge(self, logits: Tensor) -> Tensor:
        """The values of ``judgement``, which tell how sure the head is of each answer, float32 ``[batch, values]``.

        ValueError if it cannot tell.
        """
        raise ValueError(f"the backbone gives a {self.gives}, whose confidence is not known")

    def best(self, logits: Tensor, longest: int) -> Tensor:
        """The answers of one pass, of ``longest`` tokens at most, as numbers: ``[batch]`` or ``[batch, values]``."""
        return self.prediction(logits)

    def to_texts(self, instances: Sequence[Instance], encoded: Encoded, rows: NDArray, values: NDArray) -> list[str]:
        """The texts of the values of ``best`` on rows of a split; ValueError if texts are generated."""
        raise ValueError("a text is generated, not read from one pass")

    def reference(self, instance: Instance, labels: Tensor) -> str:
        """The text of the (first) right answer; empty if there is none."""
        return str(instance.target)

    def classes(self, instances: Sequence[Instance]) -> NDArray:
        """The class names, or scores, that classified instances have in the data, ``[n]``."""
        return np.array([str(instance.target) for instance in instances])

    def facts(self, encoded: Encoded) -> dict[str, NDArray]:
        """Facts about the targets, known before any decision, by name, each ``[n]``."""
        return {}


def judged_choice(logits: Tensor) -> Tensor:
    """Log-odds of the best of ``[batch, classes]``, its margin over the next, entropy in nats: ``[batch, 3]``."""
    log_prob = logits.float().log_softmax(dim=-1)
    two, place = log_prob.topk(min(2, logits.shape[-1]), dim=-1)
    probability = two.exp()
    margin = probability[:, :1] - (probability[:, 1:] if two.shape[1] > 1 else 0.0)
    # What is below the limit has the probability 0. There are few operations, as each takes time in an exported graph.
    entropy = -(log_prob.exp() * log_prob.clamp(min=LEAST_LOG)).sum(dim=-1, keepdim=True)
    # The sum of the others is more exact than 1 - probability.
    others = log_prob.scatter(-1, place[:, :1], MOST_UNSURE).logsumexp(dim=-1, keepdim=True)
    return torch.cat([two[:, :1] - others, margin, entropy], dim=1)


def log_odds_of(log_prob: Tensor) -> Tensor:
    """Log-odds of probabilities, from their logarithms; clipped at -30 and 30."""
    others = (-torch.expm1(log_prob)).clamp(min=LEAST_LIKELIHOOD).log()
    return (log_prob - others).clamp(MOST_UNSURE, -MOST_UNSURE)


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, ``[batch, length]``, from logits ``[batch, length, classes]``."""
    return logits.float().log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
