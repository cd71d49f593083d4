"""What every head can do, whatever kind of answers it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sd_gym.switch import FlopsModel, Seen, Switchboard

if TYPE_CHECKING:
    from sd_gym.config import BackboneConfig
    from sd_gym.tasks.encoding import Encoded
    from sd_gym.tasks.instance import Instance

LEAST_LIKELIHOOD = 1e-13  # whose logarithm is taken: about minus 30
IGNORED = -100  # a label that counts not
NO_MODEL_INPUTS = ("labels", "context_mask")
# How a quality is come by: see ``Head.measured_by``.
Measure = Literal["exact", "balanced", "likelihood", "of_text"]


@dataclass(frozen=True)
class Targets:
    """What the backbone shall answer; the fields are those of ``sd_gym.tasks.encoding.Encoded``."""

    labels: Tensor
    target_length: NDArray
    target_cut: NDArray
    context_mask: Tensor | None = None
    offsets: Tensor | None = None


class Given(Protocol):
    """A split: its instances, and their tensors."""

    instances: Sequence[Instance]
    encoded: Encoded


class Runs(Given, Protocol):
    """What runs the backbone on rows of a split under decisions, for a head that wants its answers.

    Attributes:
        longest: Longest answer, in tokens.
    """

    longest: int

    def in_passes(
        self, rows: NDArray, decisions: NDArray, value: Callable[[Tensor, Tensor], Tensor], seen: Seen | None = None
    ) -> NDArray:
        """A value, or several, of each row's logits and labels, float64 ``[n]`` or ``[n, values]``."""

    def under_all(self, rows: NDArray, masks: NDArray, value: Callable[[Tensor, Tensor], Tensor]) -> NDArray:
        """Values under each of ``masks [masks, switches + 1]``, float64 ``[n, masks, values]``."""

    def generated(self, rows: NDArray, decisions: NDArray, seen: Seen | None = None) -> list[str]:
        """What ``generate()`` gives for each row."""

    def generated_under_all(self, rows: NDArray, masks: NDArray) -> list[list[str]]:
        """What ``generate()`` gives for each row under each of ``masks [masks, switches + 1]``."""


class Head(ABC):
    """One kind of output: how it is loaded, what it is taught, what it says, and what that is worth.

    A head has no weights and keeps no model: those are the backbone's. What it is told of the model stands in its
    ``settings``.

    Attributes:
        name: What it is called.
        gives: What a task asks for: a ``label`` (or score), a ``span`` of the context, or a ``text``.
        auto_class: The class of ``transformers`` that loads such a model.
        stored_as: What the names of the model classes that have it end with.
        learned_by: How preparing calls the quality that it validates by.
        padding_side: Where batches are padded.
        sees_confidence: Whether it has a probability in the whole answer before it is given.
    """

    name: ClassVar[str]
    gives: ClassVar[str]
    auto_class: ClassVar[str]
    stored_as: ClassVar[tuple[str, ...]]
    learned_by: ClassVar[str]
    padding_side: ClassVar[Literal["left", "right"]] = "right"
    sees_confidence: ClassVar[bool] = False

    # --- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def fits(cls, model: PreTrainedModel) -> bool:
        """Whether a model has such a head, if none of those before it in ``HEADS`` fits."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The head of a model that it fits."""
        return cls()

    @classmethod
    def is_stored(cls, config: PretrainedConfig, architectures: Sequence[str]) -> bool:
        """Whether a model was saved with such a head, if with none of those before it in ``HEADS``."""
        return any(part in name for name in architectures for part in cls.stored_as)

    @classmethod
    def load_options(cls, config: PretrainedConfig) -> dict[str, Any]:
        """What its class is loaded with.

        Raises:
            BackboneError: If the architecture has no such head.
        """
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """What encoding depends on, as JSON takes it."""
        return {"head": self.name}

    # --- inputs and targets -------------------------------------------------------------------------------------------

    def prompting(self, backbone: BackboneConfig) -> BackboneConfig:
        """The backbone's part of the config with the prompt and stop that it takes, of those that are there.

        Raises:
            ValueError: If it needs a prompt and there is none.
        """
        return backbone.model_copy(update={"prompt": None, "stop": None})

    def source_options(self) -> dict[str, bool]:
        """What tokenizing its inputs has to tell."""
        return {}

    @abstractmethod
    def targets(
        self,
        instances: Sequence[Instance],
        source: BatchEncoding,
        tokenizer: PreTrainedTokenizerBase,
        backbone: BackboneConfig,
        *,
        unanswerable: bool,
    ) -> Targets:
        """The targets of instances whose tokenised inputs are ``source``; arguments as of ``encode``."""

    def batch(self, encoded: Encoded, indices: NDArray, device: torch.device) -> dict[str, Tensor]:
        """Everything that a pass needs of some instances, cut to the longest of them, on ``device``."""
        inputs = encoded.inputs(indices, device, padding_side=self.padding_side)
        return inputs | {name: value.to(device) for name, value in self._beside(encoded, indices).items()}

    def _beside(self, encoded: Encoded, indices: NDArray) -> dict[str, Tensor]:
        """What a pass needs beside the model's inputs."""
        return {"labels": encoded.labels[torch.from_numpy(np.asarray(indices))]}

    def shortened(self, inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """A batch whose inputs are cut to so many tokens, where they are longer."""
        columns = slice(-length, None) if self.padding_side == "left" else slice(length)
        return {name: value if name == "labels" else value[:, columns] for name, value in inputs.items()}

    # --- a pass -------------------------------------------------------------------------------------------------------

    def forward(self, board: Switchboard, batch: dict[str, Tensor], call: Callable[..., Any] | None = None) -> Tensor:
        """Logits of one forward pass, teacher-forced where texts are generated.

        Args:
            board: The backbone's switchboard; its decisions in force apply.
            batch: As ``batch`` gives it.
            call: What to call instead of the model (the same model, wrapped for several processes).

        Returns:
            ``[batch, target length, vocabulary]``, ``[batch, classes]``, or ``[batch, 2, length]`` (starts and ends).
        """
        return (call or board.model)(**model_inputs(batch)).logits

    def kept(self, batch: dict[str, Tensor], keep: NDArray | Tensor) -> NDArray | Tensor:
        """The tokens that a pass on a batch keeps, of those that its inputs keep, ``[batch, length]``.

        What else depends on that is changed in the batch.
        """
        return keep

    def lengths(self, source: NDArray, target: NDArray, kept: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """What ``FlopsModel.costs`` takes for a pass on inputs and their answers.

        Args:
            source: Tokens of the input, or of the prompt, int ``[n]``.
            target: Tokens of the answer, int ``[n]``.
            kept: Tokens of the input that are not dropped, int ``[n]``.
        """
        return source, source, kept  # a decoder that classifies behind an encoder reads the input again

    def answer_costs(
        self, flops: FlopsModel, source: NDArray, target: NDArray, kept: NDArray
    ) -> tuple[NDArray, NDArray]:
        """What inputs and their answers cost, as ``FlopsModel.costs`` gives it; lengths as of ``lengths``."""
        return flops.costs(*self.lengths(source, target, kept))

    def decoded(self, target: NDArray, kept: NDArray) -> NDArray:
        """Tokens that a decoder behind an encoder runs on, of the same shape."""
        return kept

    def positions(self, source: int, target: int) -> dict[str, int]:
        """Positions that the model needs for the longest input and target, by what they are."""
        return {"max_source_length": source}

    # --- learning -----------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the labels that count."""
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    def distillation(self, logits: Tensor, dense_logits: Tensor, labels: Tensor) -> Tensor:
        """Mean KL divergence from the dense output over the labels that count; no gradient to the dense."""
        counted = labels != IGNORED
        return divergence(logits[counted], dense_logits.detach()[counted])

    # --- what an answer is worth --------------------------------------------------------------------------------------

    def measured_by(self, quality: str) -> Measure:
        """How a quality of that name is come by.

        ``exact``: of the logits, by ``exact``; ``balanced``: that, weighed by class; ``likelihood``: relative to the
        dense backbone's; ``of_text``: of the answer's text.

        Raises:
            ValueError: If it has no such quality.
        """
        measures: dict[str, Measure] = {"exact_match": "exact", "metric": "of_text"}
        return measures.get(quality, quality)

    @property
    def learned_as(self) -> tuple[Measure, str]:
        """How the quality that preparing validates by is come by, and the metric of texts, where it is of texts."""
        return "exact", ""

    @abstractmethod
    def exact(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """Quality of each row in [0, 1], float32 ``[batch]``: 1.0 where the answer is exactly the reference."""

    @abstractmethod
    def likelihood(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """Probability of the reference, float32 ``[batch]``.

        A graded quality where exact match is too coarse, from one teacher-forced pass.
        """

    def dense_loss(self, likelihood: NDArray, label_range: float) -> NDArray:
        """The loss that a likelihood stands for, float64 ``[n]``: its negative logarithm."""
        return -np.log(np.maximum(likelihood, LEAST_LIKELIHOOD))

    def prediction(self, logits: Tensor) -> Tensor:
        """What a metric of a whole data set compares with the labels, ``[batch]``.

        Raises:
            ValueError: If its answers are none that such a metric compares.
        """
        raise ValueError(f"this metric compares classes or scores, and the backbone gives a {self.gives}")

    def confidence(self, logits: Tensor) -> Tensor:
        """Probability of its answer, ``[batch]``; only where ``sees_confidence``."""
        raise ValueError(f"a {self.gives} has no confidence before it stands")

    # --- what is said -------------------------------------------------------------------------------------------------

    def read(self, logits: Tensor, longest: int) -> Tensor:
        """What one pass says, ``[batch]`` or ``[batch, values]``, for ``said`` to put in words.

        Args:
            logits: As ``forward`` gives them.
            longest: Longest answer, in tokens.
        """
        return self.prediction(logits)

    @abstractmethod
    def said(self, given: Given, rows: NDArray, values: NDArray) -> list[str]:
        """What ``read`` gave for rows of a split, in words."""

    def answers(self, runs: Runs, rows: NDArray, decisions: NDArray, seen: Seen | None = None) -> list[str]:
        """What the backbone says to rows under decisions, to be read; it goes on from what they have ``seen``."""
        values = runs.in_passes(rows, decisions, lambda logits, _: self.read(logits, runs.longest), seen)
        return self.said(runs, rows, values)

    def answers_and_likelihood(
        self, runs: Runs, rows: NDArray, decisions: NDArray, label_range: float
    ) -> tuple[list[str], NDArray]:
        """``answers`` and the likelihood of the references, float64 ``[n]``, from as few passes as that takes."""
        values = runs.in_passes(rows, decisions, self._reads_and_rates(runs.longest, label_range))
        return self.said(runs, rows, values[:, :-1]), values[:, -1]

    def answers_under_all(
        self, runs: Runs, rows: NDArray, masks: NDArray, label_range: float
    ) -> tuple[list[list[str]], NDArray]:
        """``answers_and_likelihood`` under each of ``masks [masks, switches + 1]``, which share what they agree on.

        Returns:
            The texts, a list for each mask, and the likelihoods, float64 ``[n, masks]``.
        """
        values = runs.under_all(rows, masks, self._reads_and_rates(runs.longest, label_range))
        return [self.said(runs, rows, of_mask[:, :-1]) for of_mask in values.swapaxes(0, 1)], values[..., -1]

    def _reads_and_rates(self, longest: int, label_range: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Takes logits and labels to what ``read`` gives and, in a last column, the likelihood: ``[batch, values]``."""

        def both(logits: Tensor, labels: Tensor) -> Tensor:
            read = self.read(logits, longest).reshape(len(logits), -1)
            return torch.cat([read, self.likelihood(logits, labels, label_range)[:, None]], dim=1)

        return both

    def reference(self, instance: Instance, labels: Tensor) -> str:
        """What is right, to be read like an answer; of several right texts the first, empty if there is none."""
        return str(instance.target)

    def prompt_length(self, inputs: Tensor) -> int:
        """Tokens of what ``generate()`` gives that stand in front of the answer; inputs are ``[n, length]``."""
        return 1  # what a decoder starts with

    def new_tokens(self, tokens: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Of the tokens that ``generate()`` gives, those of the answer."""
        return tokens

    def answered(self, instances: Sequence[Instance], answers: Sequence[str]) -> Sequence[Instance]:
        """The instances with what was answered as their targets, where the length of an answer counts."""
        return instances

    def classes(self, instances: Sequence[Instance]) -> NDArray:
        """What the data say of classified instances, ``[n]``: names of classes, or scores."""
        return np.array([str(one.target) for one in instances])

    def facts(self, encoded: Encoded) -> dict[str, NDArray]:
        """What is known of each instance's target before any decision, by name, each ``[n]``."""
        return {}


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model reads to represent its input."""
    return {name: value for name, value in batch.items() if name not in NO_MODEL_INPUTS}


def reading_ratio(
    head: Head, flops: FlopsModel, source: NDArray, kept: NDArray, skip: NDArray, ranking: NDArray
) -> NDArray:
    """FLOPs to read inputs, and to answer one token where texts are generated, over those of dense: float64 ``[n]``.

    Args:
        head: The backbone's.
        flops: Likewise.
        source: Tokens of each input, int ``[n]``.
        kept: Those that are not dropped, int ``[n]``.
        skip: Integers or booleans ``[n, switches]``, 1 = skipped.
        ranking: FLOPs of ranking the tokens beforehand, int ``[n]``.
    """
    one = np.ones_like(source)
    always, switched = head.answer_costs(flops, source, one, kept)
    dense_always, dense = head.answer_costs(flops, source, one, source)
    ran = always + (switched * (1 - np.asarray(skip, dtype=np.int64))).sum(axis=1)
    return flops_share(ran + ranking, dense_always + dense.sum(axis=1))


def flops_share(ran: NDArray, dense: NDArray) -> NDArray:
    """FLOPs over dense FLOPs, float64 ``[n]``; 1.0 where the dense model computes nothing, as on padding alone."""
    return np.divide(ran, dense, out=np.ones(len(ran)), where=dense > 0)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean KL divergence over rows of logits ``[rows, classes]``."""
    log_prob, target = F.log_softmax(logits, dim=-1), F.log_softmax(target, dim=-1)
    return F.kl_div(log_prob, target, reduction="batchmean", log_target=True)


def nothing_generated(count: int) -> dict[str, NDArray]:
    """The lengths of targets that are no texts."""
    return {"target_length": np.ones(count, dtype=np.int64), "target_cut": np.zeros(count, dtype=bool)}


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, ``[batch, length]``, of logits ``[batch, length, classes]``."""
    return logits.float().log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
