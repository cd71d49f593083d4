"""Heads that classify the whole input."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.heads.answers import CHOICE, judged_choice, log_likelihoods
from sd_gym.backbones.heads.base import Head
from sd_gym.backbones.heads.encoding import nothing_generated
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded, Targets
from sd_gym.data.instance import Instance, NamedClass, numbers_are_names
from sd_gym.errors import BackboneError, DataError, short

MULTI_LABEL = "multi_label_classification"


class LabelHead(Head):
    """Logits ``[batch, classes]``; labels are class indices, int64 ``[batch]``.

    Its batches are padded at the right. A model that pools the first position, as BERT does, ignores the mask there: it
    pools padding if inputs are padded at the left. ``names``: name of each class index, by default from ``label2id``.
    ``end``: the token that the model pools, of which all rows of a batch must have as many, as those of BART and T5.
    """

    name = "label"
    gives = "label"
    validated_by = ("exact_match", "accuracy")
    _auto_class = "AutoModelForSequenceClassification"
    _stored_as = ("ForSequenceClassification",)

    def __init__(
        self, label2id: Mapping[str, int], names: Mapping[int, str] | None = None, end: int | None = None
    ) -> None:
        self.label2id, self._end = dict(label2id), end
        self._names = names or {index: name for name, index in self.label2id.items()}

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self | None:
        """Any model that neither generates nor extracts; BackboneError if its answers are sets of classes."""
        if model.config.problem_type == MULTI_LABEL:
            raise BackboneError(
                f"the backbone's problem_type is {MULTI_LABEL}: its answers are sets of classes; expected a model of "
                "which each input has one class, or one score"
            )
        labels, names = labels_of(model.config), _names_of(model.config)
        end = model.config.eos_token_id if model.config.is_encoder_decoder else None
        return cls(labels, names | {index: name for name, index in labels.items()}, end)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, with the names of the classes."""
        return {**super().settings, "label2id": self.label2id}

    def targets(
        self, instances: Sequence[Instance], source: BatchEncoding, tokenizer: Tokenizer, backbone: BackboneConfig
    ) -> Targets:
        """The classes' indices; DataError if a label is not one of the backbone's classes, or see ``end``."""
        if self._end is not None:
            ends, name = (source.input_ids == self._end).sum(dim=1), tokenizer.convert_ids_to_tokens(self._end)
            for row in (ends != ends[0]).nonzero()[:1, 0].tolist():
                raise DataError(
                    f"{instances[row].place} has {ends[row]} tokens {name}, {instances[0].place} has {ends[0]}; this "
                    f"backbone needs as many in all rows, so pairs, and texts that contain {name}, must be given apart"
                )
        return nothing_generated(self._labels(instances))

    def _labels(self, instances: Sequence[Instance]) -> Tensor:
        if (order := self._order_of_named(instances)) is not None:
            return torch.tensor([order[int(instance.target)] for instance in instances])
        by_name = numbers_are_names(self.label2id)
        return torch.tensor([self._index(instance, by_name) for instance in instances])

    def _index(self, instance: Instance, by_name: bool) -> int:
        """The class index of an instance's label; DataError if the label is not one of the classes."""
        target = instance.target
        if isinstance(target, int) and (isinstance(target, NamedClass) or not by_name):
            if target < len(self.label2id):
                return target
        elif str(target) in self.label2id:
            return self.label2id[str(target)]
        known = f"{len(self.label2id)} classes: {', '.join([*self.label2id][:20])}"
        raise DataError(
            f"{instance.place}: label {short(target)} is not one of the backbone's {known}"
            f"{' ...' if len(self.label2id) > 20 else ''}"
        )

    def in_data_order(self, classes: NDArray, instances: Sequence[Instance]) -> NDArray:
        """Class indices, of the model, as the data set of the instances numbers them; -1: it has no such class."""
        if (order := self._order_of_named(instances)) is None:
            return classes
        numbers = {index: number for number, index in enumerate(order)}
        return np.array([numbers.get(index, -1) for index in classes.tolist()])

    def _order_of_named(self, instances: Sequence[Instance]) -> list[int] | None:
        """The model's index of each class that a data set names; ``None`` if it does not, or the model has other names.

        Models and data sets may order the same classes differently.
        """
        targets = [instance.target for instance in instances if isinstance(instance.target, NamedClass)]
        if not targets or len(targets) < len(instances):
            return None
        names = targets[0].names
        for known, wanted in ((self.label2id, names), (_folded(self.label2id), [name.casefold() for name in names])):
            if known is not None and len({*wanted}) == len(names) and all(name in known for name in wanted):
                return [known[name] for name in wanted]
        return None

    def exact(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """1.0 where the most probable class is the right one."""
        return (self.prediction(logits) == labels).float()

    def likelihood(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """The probability of the right class."""
        return log_likelihoods(logits[:, None], labels[:, None])[:, 0].exp()

    def prediction(self, logits: Tensor) -> Tensor:
        """The most probable class, int64 ``[batch]``."""
        return logits.argmax(dim=1)

    confidence = staticmethod(lambda logits: logits.float().softmax(dim=-1).amax(dim=-1))
    judgement = CHOICE

    def judge(self, logits: Tensor) -> Tensor:
        """See ``judged_choice``."""
        return judged_choice(logits)

    def to_texts(self, instances: Sequence[Instance], encoded: Encoded, rows: NDArray, values: NDArray) -> list[str]:
        """The classes' names, or the scores."""
        return [self._to_text(value) for value in values.ravel()]

    def reference(self, instance: Instance, labels: Tensor) -> str:
        """The right class's name."""
        return self._to_text(labels.item())

    def _to_text(self, value: float) -> str:
        return self._names[int(value)]


def _folded(label2id: Mapping[str, int]) -> dict[str, int] | None:
    """Class indices by names without case; ``None`` if two names are then the same."""
    folded = {name.casefold(): index for name, index in label2id.items()}
    return folded if len(folded) == len(label2id) else None


def stored_labels(stored: Mapping[str, int], instances: Sequence[Instance]) -> dict[str, int] | None:
    """A stored head's class indices, under the names of a data set; ``None`` if it does not know all of its classes.

    Indices without names are the head's own where it names as many classes.
    """
    targets = {instance.target for instance in instances}
    named = next((instance.target.names for instance in instances if isinstance(instance.target, NamedClass)), None)
    if named is None and all(isinstance(target, int) for target in targets) and not numbers_are_names(stored):
        nameless = all(name == f"LABEL_{index}" for name, index in stored.items())
        return None if nameless or {*range(len(stored))} != targets else dict(stored)
    wanted = {str(name) for name in named or targets}
    if wanted <= stored.keys():
        return dict(stored)
    folded, by_fold = _folded(stored), {name.casefold(): name for name in wanted}
    if folded is None or len(by_fold) < len(wanted) or not by_fold.keys() <= folded.keys():
        return None
    return {by_fold.get(name.casefold(), name): index for name, index in stored.items()}


def labels_of(config: PretrainedConfig) -> dict[str, int]:
    """Class index of each class's name in a model's configuration.

    ``id2label`` has the names of answers, so it counts where ``label2id`` says something else, unless two classes have
    the same name there, or it has no names.
    """
    names = _names_of(config)
    labels = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    nameless = any(name == f"LABEL_{index}" for index, name in names.items())
    if labels and (nameless or len({*names.values()}) < len(names)):
        return labels
    others = {name: index for name, index in labels.items() if index in names and name != f"LABEL_{index}"}
    return others | {name: index for index, name in names.items()}


def _names_of(config: PretrainedConfig) -> dict[int, str]:
    return {int(index): str(name) for index, name in (config.id2label or {}).items()}
