"""Families of tasks: the fields of their rows, their kinds of answers, and their metrics."""

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

    NewHead = tuple[type[Head] | None, dict[str, int] | None]  # see ``Task.head_to_prepare``

LONGEST_TEXT = 2_000_000  # characters; longer ones are whole files, not rows
LARGEST = 2**31 - 1  # the largest label, score and level of difficulty


class Task(ABC):
    """A family of tasks; one of your own is a subclass, registered by ``sd_gym.register_task``."""

    texts: tuple[str, ...]  # the fields with the texts of an input, all required
    optional: str | None = None  # the field of a further text, which may be missing
    reference: str  # the field of the right answer
    gives: tuple[str, ...]  # the kinds of answers that fit, as in a head's ``gives``: ``label``, ``span``, ``text``
    metrics: tuple[str, ...]  # metrics that apply, the default first
    weighs_classes: bool = False  # whether ``quality=balanced`` applies
    unknown: Any = ""  # the value of a reference that is not known

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that a row needs."""
        return (*self.texts, self.reference)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The fields with the texts of an input, the optional one last."""
        return self.texts if self.optional is None else (*self.texts, self.optional)

    @property
    def needed(self) -> tuple[str, ...]:
        """The fields of texts that must not be empty; other rows are left out."""
        return self.texts

    @abstractmethod
    def instance(
        self, row: Mapping[str, Any], identity: str, origin: str, *, difficulty: int = 0, unanswerable: bool = True
    ) -> Instance:
        """The instance, of id ``identity``, of a row that has all fields and no empty text.

        ``origin``: file and line, for messages; ``unanswerable``: whether there may be no right answer. Raises
        ``DataError`` if the reference is malformed.
        """

    def facts(self, instances: Sequence[Instance], head: Head) -> dict[str, NDArray]:
        """Facts about the right answers that reports group results by, by name, each ``[n]``."""
        return {}

    def right(self, value: Any) -> list[str] | None:
        """The right texts of a row with this reference; ``None`` if it says nothing."""
        if value is None:
            return None
        return [value] if isinstance(value, str) else [str(answer) for answer in value]

    def head_to_prepare(self, stored: type[Head] | None, answers: str | None, train: Sequence[Instance]) -> NewHead:
        """The head to prepare a backbone with (``None``: the ``stored`` one), and the class indices of a new one.

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
    """Register a family of tasks of your own: ``task: name`` then works in the YAML files of envs.

    Args:
        name: Its name. A second one of the same name replaces the first.
        task: An instance of a subclass of ``sd_gym.tasks.family.Task``, such as
            ``sd_gym.tasks.summarization.TextToText("field", "field", metrics)``.

    Raises:
        TypeError: If ``task`` is no such instance.
        ValueError: If the name is one of the project's.
    """
    if not isinstance(task, Task):
        raise TypeError(f"the task {name!r} has to be an instance of sd_gym.tasks.family.Task, got {task!r}")
    TASKS.register(name, task)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_text(value: Any, name: str, origin: str = "") -> None:
    """Raise DataError if a value is not a text that a tokenizer can read; ``origin``: file and line for the message."""
    name = f"{origin}: {name}" if origin else name
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, got {short(value)}")
    if len(value) > LONGEST_TEXT:
        raise DataError(
            f"{name} has {len(value):,} characters, expected at most {LONGEST_TEXT:,}; shorten it, or check "
            "that the file has one row per line"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has half a character at place {error.start + 1} (a lone surrogate such as '\\ud83d'), "
            "which no tokenizer can read; remove it"
        ) from error
