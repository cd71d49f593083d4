"""Inputs and answers, whatever runs the model: nothing here imports torch."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sd_gym.data.instance import numbers_are_names
from sd_gym.errors import short
from sd_gym.tasks.family import LARGEST, TASKS, check_text, is_number
from sd_gym.tasks.metrics import text_quality

Input = str | Sequence[str] | Mapping[str, Any]


class Answer(NamedTuple):
    """The outcome of one input."""

    answer: str  # the text that was generated or extracted, the name of the class, or the score
    skip: NDArray  # which switches it skipped, bool [switches]
    token_level: int  # level at which it dropped tokens
    flops_ratio: float  # FLOPs over those of the dense backbone, the policy's own included
    unknown_tokens: int  # tokens of the input that the tokenizer does not know
    went_on: bool = False  # whether what it skipped ran after all, because the policy rejected the first answer


class TextModel(ABC):
    """A model that answers texts.

    Attributes:
        task: Name of the task.
        metric: The metric that compares an answer with its references.
        fields: Names of an input's texts, of which the last one may be ``optional``.
        reference: Name of the right answer in a row.
        names: Name of each class, by its index.
        head: Name of the backbone's head, such as ``label`` or ``score``.
        label_range: Distance between the lowest and the highest score.
    """

    task: str
    metric: str
    fields: tuple[str, ...]
    optional: bool
    reference: str
    names: dict[int, str]
    head: str
    label_range: float
    _has_warned = False

    def __call__(self, inputs: Sequence[Input], *, dense: bool = False, batch_size: int | None = None) -> list[Answer]:
        """Answer inputs, in their order; those of about the same length, or of the same decision, run together.

        The first call with words that the tokenizer does not know warns, with the number of such inputs.

        Args:
            inputs: Texts; where an input has two (``fields``), pairs of texts; or mappings with these names.
            dense: Whether everything runs, to compare.
            batch_size: Largest number of inputs that run together, where memory is short; ``None``: as many as is fast.

        Raises:
            ValueError: If an input is malformed, or a text has half a character (a lone surrogate); the message has its
                number. If the batch size is below 1.
        """
        answers = self.answers(inputs, dense=dense, batch_size=batch_size)
        unknown = sum(answer.unknown_tokens > 0 for answer in answers)
        if unknown and not self._has_warned:
            self._has_warned = True
            warnings.warn(unknown_words(unknown, len(answers)), stacklevel=2)
        return answers

    def answers(self, inputs: Sequence[Input], *, dense: bool = False, batch_size: int | None = None) -> list[Answer]:
        """Answer like a call, without its warning."""
        if isinstance(inputs, str | Mapping):
            raise ValueError(f"expected a list of inputs, got one {type(inputs).__name__}; put it in a list")
        if hasattr(inputs, "columns"):  # it would iterate over their names
            raise ValueError(f"expected a list of inputs, got a {type(inputs).__name__}; pass one of its columns")
        if batch_size is not None and (batch_size < 1 or batch_size % 1):
            raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
        texts = []
        for number, given in enumerate(inputs):
            try:
                texts.append(self.checked(given))
            except ValueError as error:
                raise ValueError(f"input {number}: {error}") from None
        return self._answers(texts, dense, batch_size) if texts else []

    @abstractmethod
    def _answers(self, texts: list[list[str]], dense: bool, batch_size: int | None) -> list[Answer]:
        """The answers to texts that were checked; at least one."""

    def checked(self, given: Any) -> list[str]:
        """The texts of an input; ``ValueError`` if it is malformed, or no tokenizer can read one of its texts."""
        names, optional = self.fields, self.optional
        texts: Any = [given.get(name) for name in names] if isinstance(given, Mapping) else given
        texts = list(texts) if isinstance(texts, list | tuple) else [texts]
        if optional and len(texts) == len(names) and (texts[-1] is None or not str(texts[-1]).strip()):
            texts = texts[:-1]
        fits = len(names) - optional <= len(texts) <= len(names)
        if not fits or not all(isinstance(text, str) and text.strip() for text in texts):
            expected = " and ".join(names) + (" (which may be missing)" if optional else "")
            raise ValueError(f"expected {expected}, each a text that is not empty; got {short(given)}")
        for name, text in zip(names, texts, strict=False):
            check_text(text, name)
        return texts

    def quality(self, answer: str, right: Any) -> float | None:
        """The quality in [0, 1] of an answer to a row whose reference is ``right``; ``None`` if that is no reference.

        A class is right or wrong, as in the env; a score counts by its distance, a text by ``metric``.
        """
        if self.head == "score":
            if not is_number(right) or not abs(right) <= LARGEST:
                return None
            return max(0.0, 1 - abs(float(answer) - right) / self.label_range)
        try:
            if self.head == "label":
                name = self._class_name(right)
                return None if name is None else float(answer == name)
            references = TASKS.find(self.task).right(right)
            return None if references is None else text_quality(self.metric, answer, references)
        except TypeError:  # a list in the place of a label, or the reverse
            return None

    def _class_name(self, label: Any) -> str | None:
        """The name of a label's class, as ``LabelHead`` finds it."""
        names = self.names.values()
        if label is None or isinstance(label, bool):
            return None
        if isinstance(label, float) and label.is_integer() and str(label) not in names:
            label = int(label)  # Parquet and pandas give indices as 1.0
        if isinstance(label, int) and not numbers_are_names(names):
            return self.names.get(label)
        return str(label) if str(label) in names else None


def unknown_words(unknown: int, inputs: int) -> str:
    """The warning that some inputs have words that the tokenizer does not know."""
    return (
        f"{unknown:,} of {inputs:,} inputs have words that the backbone's tokenizer does not know, so the answers to "
        "them mean little; is it the right backbone for these texts?"
    )
