"""An answer to a question on a context, generated or extracted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sd_gym.data.instance import Instance
from sd_gym.errors import DataError, short
from sd_gym.tasks.family import Task, check_text

if TYPE_CHECKING:
    from sd_gym.backbones.heads import Head


class QuestionAnswering(Task):
    """Answers are lists of right texts, empty where a question has no answer; or SQuAD's form of that."""

    texts = ("question", "context")
    reference = "answers"
    gives = ("text", "span")
    metrics = ("squad", "exact_match")

    @property
    def unknown(self) -> list[str]:
        """No answer."""
        return []

    def instance(
        self, row: Mapping[str, Any], identity: str, origin: str, *, difficulty: int = 0, unanswerable: bool = True
    ) -> Instance:
        """With the question, which is never dropped or cut, as its source, and the context beside it."""
        answers, spans = _answers(row["answers"], origin)
        if not answers and not unanswerable:
            raise DataError(f"{origin}: the question has no answer; where that may be, set unanswerable to true")
        target, *others = dict.fromkeys(answers) or [""]
        question = row["question"]
        protected = ((0, len(question)),)
        return Instance(identity, question, target, difficulty, row["context"], protected, tuple(others), spans, origin)

    def facts(self, instances: Sequence[Instance], head: Head) -> dict[str, NDArray]:
        """Whether there is an answer."""
        return {"answerable": np.array([bool(instance.references) for instance in instances])}

    def right(self, value: Any, names: Mapping[int, str]) -> list[str]:
        """The texts."""
        return super().right(value.get("text", []) if isinstance(value, Mapping) else value, names)

    def head_to_prepare(
        self, stored: type[Head] | None, answers: str | None, train: Sequence[Instance]
    ) -> tuple[type[Head] | None, dict[str, int] | None]:
        """One that extracts, if that is asked for, or nothing else is there."""
        from sd_gym.backbones.heads import Seq2SeqHead, SpanHead

        wanted = answers or (stored and stored.answering)
        return (None if wanted == Seq2SeqHead.answering else SpanHead), None


def _answers(value: Any, origin: str) -> tuple[list[str], tuple[tuple[int, int], ...]]:
    """The texts of answers, and where they stand in SQuAD's form: ``{"text": [...], "answer_start": [...]}``."""
    answers = value.get("text") if isinstance(value, dict) else value
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise DataError(
            f"{origin}: answers must be a list of texts, or SQuAD's form of it, got {short(value)}; a "
            "question without answer has an empty list"
        )
    for answer in answers:
        check_text(answer, "an answer", origin)
    starts = value.get("answer_start") if isinstance(value, dict) else None
    if starts is None:
        return answers, ()
    if (
        not isinstance(starts, list)
        or len(starts) != len(answers)
        or not all(isinstance(start, int) and start >= 0 for start in starts)
    ):
        raise DataError(f"{origin}: answer_start must be one character index an answer, got {short(value)}")
    spans = ((start, start + len(answer)) for start, answer in zip(starts, answers, strict=True))
    return answers, tuple(dict.fromkeys(spans))


QUESTION_ANSWERING = QuestionAnswering()
