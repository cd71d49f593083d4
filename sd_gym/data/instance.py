"""The unit of every data set: one instance."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Instance:
    """One input with its reference.

    Attributes:
        id: Unique within its data set, stable between runs (``"test-17"``).
        source: The text that the backbone reads.
        target: The reference: a text to generate, a class index or word, or a score (regression).
        difficulty: Difficulty of the instance, from 1 (trivial); 0 if unknown.
        source_pair: The second sentence of a sentence pair.
        protected: Parts of ``source``, as (start, end) in characters, whose tokens are never dropped: a question, or
            the word that names the task.
        more_targets: Other correct texts.
        answer_spans: Right answers in ``source_pair``, as (start, end) in characters; empty if unknown.
        origin: File and line, for messages; empty for a generated instance.
    """

    id: str
    source: str
    target: str | int | float
    difficulty: int = 0
    source_pair: str | None = None
    protected: tuple[tuple[int, int], ...] = ()
    more_targets: tuple[str, ...] = ()
    answer_spans: tuple[tuple[int, int], ...] = ()
    origin: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """Origin or id, for messages."""
        return f"{self.origin} ({self.id})" if self.origin else f"instance {self.id}"

    @property
    def references(self) -> tuple[str, ...]:
        """All correct texts; empty if a question has no answer."""
        return (str(self.target), *self.more_targets) if self.target != "" else ()
