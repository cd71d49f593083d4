"""What a family of tasks is: the fields of its rows, its kinds of answers, and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from numpy.typing import NDArray

from sd_gym.data.instance import Instance
from sd_gym.errors import DataError, short
from sd_gym.registry import Registry

if TYPE_CHECKING:
    from sd_gym.backbones.heads import Head

LONGEST_TEXT = 2_000_000  # characters: a longer one is a file whose lines are not rows
LARGEST = 2**31 - 1  # of labels, scores and levels of difficulty


class Task(ABC):
    """A family of tasks; one of your own is a subclass, made known by ``sd_gym.register_task``.

    Attributes:
        texts: The fields of a row that are texts to be read, all of which it needs.
        optional: A further text, which may be missing; ``None``: no such field.
        reference: The field of the right answer.
        gives: The heads' ``gives`` of backbones that can do it: ``label``, ``span``, ``text``.
        metrics: Metrics that apply, the default first.
        weighs_classes: Whether ``quality=balanced`` makes sense.
        unknown: Stands for a reference that is not known.
    """

    texts: tuple[str, ...]
    optional: str | None = None
    reference: str
    gives: tuple[str, ...]
    metrics: tuple[str, ...]
    weighs_classes: bool = False
    unknown: Any = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that a row needs."""
        return (*self.texts, self.reference)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The fields that are read, the optional one last."""
        return self.texts if self.optional is None else (*self.texts, self.optional)

    @property
    def needed(self) -> tuple[str, ...]:
        """The fields that are texts without which a row is no instance."""
        return self.texts

    @abstractmethod
    def instance(
        self, row: Mapping[str, Any], identity: str, origin: str, *, difficulty: int = 0, unanswerable: bool = True
    ) -> Instance:
        """The instance with the id ``identity``, of a row that has all fields and no empty text.

        Args:
            row: The row.
            identity: The instance's id.
            origin: Where it comes from, for messages.
            difficulty: From the data; 0: not known.
            unanswerable: Whether there may be no right answer.

        Raises:
            DataError: If the reference is malformed.
        """

    def facts(self, instances: Sequence[Instance], head: Head) -> dict[str, NDArray]:
        """What is known of the right answers, by name, each ``[n]``, to report results by."""
        return {}

    def right(self, value: Any, names: Mapping[int, str]) -> list[str]:
        """The right answers of a row, in the words of ``SkippingModel``; ``names`` are those of the classes."""
        return [value] if isinstance(value, str) else [str(answer) for answer in value]

    def head_to_prepare(
        self, stored: type[Head] | None, answers: str | None, train: Sequence[Instance]
    ) -> tuple[type[Head] | None, dict[str, int] | None]:
        """The head that a backbone is prepared with (``None``: the ``stored`` one), and the class indices of a new one.

        ``answers`` is the config key, ``train`` the training split.
        """
        return None, None


TASKS: Registry[Task] = Registry(
    "task",
    {
        "classification": "sd_gym.tasks.classification:CLASSIFICATION",
        "question_answering": "sd_gym.tasks.question_answering:QUESTION_ANSWERING",
        "summarization": "sd_gym.tasks.summarization:SUMMARIZATION",
    },
)


def register_task(name: str, task: Task) -> None:
    """Make a family of tasks of your own known: then ``task: name`` works in the YAML files of envs.

    Args:
        name: Its name; a later one of the same name replaces it.
        task: An object of a subclass of ``sd_gym.tasks.family.Task``, such as ``TextToText("field", "field", metrics)``
            of ``sd_gym.tasks.summarization``.

    Raises:
        TypeError: If it is another object.
        ValueError: If the name is one of the project's.
    """
    if not isinstance(task, Task):
        raise TypeError(
            f"the task {name!r} has to be an object of a subclass of sd_gym.tasks.family.Task, got {task!r}"
        )
    TASKS.register(name, task)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_text(value: Any, name: str, origin: str = "") -> None:
    """Raise DataError if a value is no text that a tokenizer can read; ``origin``: where it stands, for the message."""
    name = f"{origin}: {name}" if origin else name
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, got {short(value)}")
    if len(value) > LONGEST_TEXT:
        raise DataError(
            f"{name} has {len(value):,} characters, expected at most {LONGEST_TEXT:,}; shorten it, or look "
            "whether the file has each row on a line of its own"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has half a character at place {error.start + 1} (a lone surrogate such as '\\ud83d'), "
            "which no tokenizer can read; remove it"
        ) from error
