"""Text to text: summarization, translation and similar tasks with two fields."""

from collections.abc import Mapping
from typing import Any

from sd_gym.data.instance import Instance
from sd_gym.tasks.family import Task


class TextToText(Task):
    """Tasks in which a backbone reads the field ``source`` and generates the field ``target``."""

    gives = ("text",)

    def __init__(self, source: str, target: str, metrics: tuple[str, ...]) -> None:
        self.texts = (source,)
        self.reference = target
        self.metrics = metrics

    @property
    def needed(self) -> tuple[str, ...]:
        """Both texts."""
        return self.fields

    def instance(
        self, row: Mapping[str, Any], identity: str, origin: str, *, difficulty: int = 0, unanswerable: bool = True
    ) -> Instance:
        """The instance, with the two texts as source and target."""
        return Instance(identity, row[self.texts[0]], row[self.reference], difficulty, origin=origin)


SUMMARIZATION = TextToText("document", "summary", ("rouge", "exact_match"))
