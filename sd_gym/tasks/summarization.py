"""A text for a text: summarization, and whatever else has two fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd_gym.data.instance import Instance
from sd_gym.tasks.family import Task


class TextToText(Task):
    """A backbone reads one text and generates another.

    Args:
        source: The field that is read.
        target: The field of the text that shall be generated.
        metrics: Metrics that apply, the default first.
    """

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
        """With the two texts as source and target."""
        return Instance(identity, row[self.texts[0]], row[self.reference], difficulty, origin=origin)


SUMMARIZATION = TextToText("document", "summary", ("rouge", "exact_match"))
