"""Classes or scores (regression) of a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sd_gym.data.instance import Instance, NamedClass
from sd_gym.errors import DataError, short
from sd_gym.tasks.family import LARGEST, Task, check_text, is_number

if TYPE_CHECKING:
    from sd_gym.backbones.heads import Head
    from sd_gym.tasks.family import NewHead


class Classification(Task):
    """Labels are class indices, words, or scores."""

    texts = ("text",)
    optional = "text_pair"
    reference = "label"
    gives = ("label", "text")
    metrics = ("accuracy", "f1", "matthews", "correlation", "exact_match")
    weighs_classes = True
    unknown = 0

    def instance(
        self, row: Mapping[str, Any], identity: str, origin: str, *, difficulty: int = 0, unanswerable: bool = True
    ) -> Instance:
        """The instance, with the label as its target; an empty second text is none."""
        label, pair = _label(row["label"], origin), row.get("text_pair") or ""
        return Instance(identity, row["text"], label, difficulty, pair if pair.strip() else None, origin=origin)

    def facts(self, instances: Sequence[Instance], head: Head) -> dict[str, NDArray]:
        """The label."""
        return {"label": head.classes(instances)}

    def right(self, value: Any) -> list[str] | None:
        """The label, of backbones that generate it."""
        return None if value is None else [str(value)]

    def head_to_prepare(self, stored: type[Head] | None, answers: str | None, train: Sequence[Instance]) -> NewHead:
        """A head with as many classes as the data."""
        from sd_gym.backbones.heads import LabelHead

        return LabelHead, classes(train)


def classes(instances: Sequence[Instance]) -> dict[str, int]:
    """Class index of each label, in the order that the data names or sorts them; a single "score" for a regression.

    Raises:
        DataError: If there are fewer than two classes, too high indices, or both words and indices.
    """
    labels: set[Any] = {instance.target for instance in instances}
    names = next((instance.target.names for instance in instances if isinstance(instance.target, NamedClass)), ())
    if len({*names}) == len(names) >= 2:
        return {name: index for index, name in enumerate(names)}
    if any(isinstance(label, float) and not label.is_integer() for label in labels):
        return {"score": 0}
    if len({type(label) for label in labels}) > 1:
        raise DataError("labels must be all class indices or all words, got both")
    if len(labels) < 2:
        raise DataError(f"expected at least two classes, got only {short(labels)}")
    if all(isinstance(label, int) for label in labels):
        if max(labels) >= len(instances):
            raise DataError(
                f"the highest class index is {max(labels)}, but the training split has only {len(instances)} rows; "
                "number the classes from 0, or use words"
            )
        labels = set(range(max(labels) + 1))
    return {str(label): index for index, label in enumerate(sorted(labels))}


def _label(value: Any, origin: str) -> str | int | float:
    if isinstance(value, str) and value.strip():
        check_text(value, "label", origin)
        return value
    if not is_number(value) or not 0 <= value <= LARGEST:
        raise DataError(
            f"{origin}: label must be a class index from 0, a label word or a score from 0 to {LARGEST}, got "
            f"{short(value)}; shift scores below 0; -1 may hide the labels of a test split: test on another one"
        )
    return value


CLASSIFICATION = Classification()
