"""The unit of every data set: one instance."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self


class NamedClass(int):
    """A class index of a data set that names its classes (``ClassLabel`` on the hub); a model may order them otherwise.

    ``names``: those of all classes of the data set, by index.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, index: int, names: tuple[str, ...]) -> Self:
        """The class at an index."""
        found = cls(index)
        found.names = names
        return found


def numbers_are_names(names: Iterable[str]) -> bool:
    """Whether numbers in data are names of classes, as where ratings are called 1 to 5; else they are indices."""
    return any(name.isdecimal() for name in names)


@dataclass(frozen=True, slots=True)
class Instance:
    """One input with its reference. Parts of texts are (start, end) in characters."""

    id: str  # unique within its data set, stable between runs (``"test-17"``)
    source: str  # the text that the backbone reads
    target: str | int | float  # a text to generate, a class index or word, or a score (regression)
    difficulty: int = 0  # from 1 (trivial); 0 if unknown
    source_pair: str | None = None  # the second sentence of a sentence pair, or the context of a question
    protected: tuple[tuple[int, int], ...] = ()  # parts of ``source`` whose tokens are never dropped: a question
    more_targets: tuple[str, ...] = ()  # other correct texts
    answer_spans: tuple[tuple[int, int], ...] = ()  # right answers in ``source_pair``; empty if unknown
    origin: str = field(default="", compare=False)  # file and line, for messages; empty for a generated instance
    is_cut: bool = False  # whether the target is a generated text that reached its limit, so its end is not known

    @property
    def place(self) -> str:
        """Origin and id, for messages."""
        if not self.origin:
            return f"instance {self.id}"
        return self.origin if self.origin.split()[-1] == self.id else f"{self.origin} ({self.id})"

    @property
    def references(self) -> tuple[str, ...]:
        """All correct texts; empty if a question has no answer."""
        return (str(self.target), *self.more_targets) if self.target != "" else ()
