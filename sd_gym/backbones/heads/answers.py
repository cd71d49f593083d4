"""What a head answers, and what that is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.data.encoded import Encoded
from sd_gym.data.instance import Instance
from sd_gym.switch import PassState

LEAST_LIKELIHOOD = 1e-13  # whose logarithm is taken: about minus 30
MOST_UNSURE = -30.0  # log-odds, and log-probabilities, at least
CHOICE = ("log_odds", "margin", "entropy")  # what ``judged_choice`` gives

Value = Callable[[Tensor, Tensor], Tensor]  # of logits and labels, each [batch, ...], to [batch] or [batch, values]


class QualityMeasure(NamedTuple):
    """How a quality is measured."""

    # Takes logits, labels and the label range to the quality, float32 ``[batch]``; ``None``: the answer's text is
    # compared with the references.
    score: Callable[[Tensor, Tensor, float], Tensor] | None
    is_relative: bool = False  # whether it counts relative to the dense backbone's
    is_balanced: bool = False  # whether it is weighed by class
    metric: str = ""  # the metric that compares texts; empty: that of the config
    name: str = ""  # what preparing calls it

    def loss(self, values: NDArray, label_range: float) -> NDArray:
        """The loss that values ``[n]`` stand for: a likelihood's negative logarithm, else how far a score is off."""
        if self.is_relative:
            return -np.log(np.maximum(values, LEAST_LIKELIHOOD))
        return label_range * (1 - values)


class SplitData(Protocol):
    """A split: its instances, and their tensors."""

    @property
    def instances(self) -> Sequence[Instance]: ...  # noqa: D102

    @property
    def encoded(self) -> Encoded: ...  # noqa: D102


class AnswerPasses(SplitData, Protocol):
    """Runs the backbone on rows of a split under decisions, for a head that wants its answers."""

    longest: int  # longest answer, in tokens

    def in_passes(self, rows: NDArray, decisions: NDArray, value: Value, seen: PassState | None = None) -> NDArray:
        """A value, or several, of each row, float64 ``[n]`` or ``[n, values]``."""
        ...

    def under_all(self, rows: NDArray, masks: NDArray, value: Value) -> NDArray:
        """Values under each of ``masks [masks, switches + 1]``, float64 ``[n, masks, values]``."""
        ...

    def generated(self, rows: NDArray, decisions: NDArray, seen: PassState | None = None) -> list[str]:
        """What ``generate()`` gives for each row."""
        ...

    def generated_and_judged(
        self, rows: NDArray, decisions: NDArray, seen: PassState | None = None
    ) -> tuple[list[str], NDArray]:
        """The same, and what ``Answers.judgement`` names of each text, float64 ``[n, values]``."""
        ...

    def generated_under_all(self, rows: NDArray, masks: NDArray) -> list[list[str]]:
        """What ``generate()`` gives for each row under each of ``masks [masks, switches + 1]``."""
        ...


class Answers(ABC):
    """Answers of one kind of output."""

    gives: ClassVar[str]  # what a task asks for: a ``label`` (or score), a ``span`` of the context, or a ``text``
    # How questions are answered, as in the config key ``answers``; ``None``: they are not.
    answering: ClassVar[str | None] = None

    def measured_by(self, quality: str | None) -> QualityMeasure:
        """How the quality of that name is measured, ``None``: the one that preparing validates by.

        ValueError if the head has no such quality.
        """
        measures = {
            None: self._learned_as,
            "exact_match": QualityMeasure(self.exact),
            "balanced": QualityMeasure(self.exact, is_balanced=True),
            "likelihood": QualityMeasure(self.likelihood, is_relative=True),
            "metric": QualityMeasure(None),
        }
        measures["agreement"] = measures["exact_match"]  # the references are the dense answers
        return measures[quality]

    @property
    @abstractmethod
    def _learned_as(self) -> QualityMeasure:
        """How the quality that preparing validates by is measured, and its name."""

    @abstractmethod
    def exact(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """Quality of each row in [0, 1], float32 ``[batch]``: 1.0 where the answer is exactly the reference."""

    @abstractmethod
    def likelihood(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """Probability of the reference, float32 ``[batch]``: a graded quality, from one teacher-forced pass."""

    def prediction(self, logits: Tensor) -> Tensor:
        """What a metric of a whole data set compares with the labels, ``[batch]``; ValueError if it cannot."""
        raise ValueError(f"this metric compares classes or scores, and the backbone gives a {self.gives}")

    @property
    def confidence(self) -> Callable[[Tensor], Tensor] | None:
        """Takes logits to the probability of the answer, ``[batch]``; ``None``: none is known before it is given."""
        return None

    # What the head says of its own answers, by name: what the answer stage shows. Empty: nothing.
    judgement: ClassVar[tuple[str, ...]] = ()
    judges_passes: ClassVar[bool] = True  # whether it judges by the logits of a pass; else by those of generating

    def judge(self, logits: Tensor) -> Tensor:
        """The ``judgement`` of each row of logits, float32 ``[batch, values]``; no label is looked at."""
        raise ValueError(f"the backbone gives a {self.gives}, and nothing says how sure it is of it")

    def in_words(self, split: SplitData, rows: NDArray, logits: Tensor, longest: int) -> list[str]:
        """The answers of one pass on rows of a split, of ``longest`` tokens at most."""
        return self._said(split, rows, self._read(logits, longest).cpu().numpy())

    def _read(self, logits: Tensor, longest: int) -> Tensor:
        """The answers of one pass, of ``longest`` tokens at most, as numbers: ``[batch]`` or ``[batch, values]``."""
        return self.prediction(logits)

    @abstractmethod
    def _said(self, split: SplitData, rows: NDArray, values: NDArray) -> list[str]:
        """What ``_read`` gave for rows of a split, in words."""

    def answers(
        self, passes: AnswerPasses, rows: NDArray, decisions: NDArray, seen: PassState | None = None
    ) -> list[str]:
        """The backbone's answers to rows under decisions, in words; passes may resume from the state ``seen``."""
        values = passes.in_passes(rows, decisions, lambda logits, _: self._read(logits, passes.longest), seen)
        return self._said(passes, rows, values)

    def answers_and_judgement(
        self, passes: AnswerPasses, rows: NDArray, decisions: NDArray, seen: PassState | None = None
    ) -> tuple[list[str], NDArray]:
        """``answers``, and the ``judgement`` of each, float64 ``[n, values]``, from the same passes."""
        values = passes.in_passes(rows, decisions, self._reads_and_judges(passes.longest), seen)
        read, judged = np.split(values, [-len(self.judgement)], axis=1)
        return self._said(passes, rows, read), judged

    def answers_and_likelihood(
        self, passes: AnswerPasses, rows: NDArray, decisions: NDArray, label_range: float
    ) -> tuple[list[str], NDArray]:
        """``answers`` and the likelihood of the references, float64 ``[n]``, from as few passes as that takes."""
        values = passes.in_passes(rows, decisions, self._reads_and_rates(passes.longest, label_range))
        return self._said(passes, rows, values[:, :-1]), values[:, -1]

    def answers_under_all(
        self, passes: AnswerPasses, rows: NDArray, masks: NDArray, label_range: float
    ) -> tuple[list[list[str]], NDArray]:
        """``answers_and_likelihood`` under each of ``masks [masks, switches + 1]``, which share what they agree on.

        The texts are a list for each mask, and the likelihoods float64 ``[n, masks]``.
        """
        values = passes.under_all(rows, masks, self._reads_and_rates(passes.longest, label_range))
        return [self._said(passes, rows, of_mask[:, :-1]) for of_mask in values.swapaxes(0, 1)], values[..., -1]

    def _reads_and_judges(self, longest: int) -> Value:
        """Takes logits to what ``read`` gives and, in the last columns, the judgement: ``[batch, values]``."""

        def both(logits: Tensor, labels: Tensor) -> Tensor:
            return torch.cat([self._read(logits, longest).reshape(len(logits), -1), self.judge(logits)], dim=1)

        return both

    def _reads_and_rates(self, longest: int, label_range: float) -> Value:
        """Takes logits and labels to what ``read`` gives and, in a last column, the likelihood: ``[batch, values]``."""

        def both(logits: Tensor, labels: Tensor) -> Tensor:
            read = self._read(logits, longest).reshape(len(logits), -1)
            return torch.cat([read, self.likelihood(logits, labels, label_range)[:, None]], dim=1)

        return both

    def reference(self, instance: Instance, labels: Tensor) -> str:
        """The right answer in words; of several the first, empty if there is no answer."""
        return str(instance.target)

    def answered(self, instances: Sequence[Instance], answers: Sequence[str]) -> Sequence[Instance]:
        """The instances with their answers as targets, where the length of an answer counts."""
        return instances

    def classes(self, instances: Sequence[Instance]) -> NDArray:
        """What the data say of classified instances, ``[n]``: names of classes, or scores."""
        return np.array([str(instance.target) for instance in instances])

    def facts(self, encoded: Encoded) -> dict[str, NDArray]:
        """What is known of each instance's target before any decision, by name, each ``[n]``."""
        return {}


def judged_choice(logits: Tensor) -> Tensor:
    """Of a choice: log-odds of the best one, its margin over the next, entropy in nats; ``[batch, 3]``."""
    log_prob = logits.float().log_softmax(dim=-1)
    probability = log_prob.exp()
    two = probability.topk(min(2, logits.shape[-1]), dim=-1).values
    margin = two[:, 0] - (two[:, 1] if two.shape[1] > 1 else 0.0)
    return torch.stack(
        [log_odds_of(log_prob.amax(dim=-1)), margin, -(probability * log_prob).nan_to_num().sum(dim=-1)], dim=1
    )


def log_odds_of(log_prob: Tensor) -> Tensor:
    """Log-odds of probabilities whose logarithms are given, within 30."""
    others = (-torch.expm1(log_prob)).clamp(min=LEAST_LIKELIHOOD).log()
    return (log_prob - others).clamp(MOST_UNSURE, -MOST_UNSURE)


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, ``[batch, length]``, of logits ``[batch, length, classes]``."""
    return logits.float().log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
