"""Classes of labels."""

import pytest
from transformers import PretrainedConfig

from sd_gym.backbones.heads.label import class_index, labels_of
from sd_gym.data.instance import Instance
from sd_gym.errors import DataError


def test_labels_outside_the_classes():
    classes = {"no": 0, "yes": 1}
    assert class_index(Instance("a", "x", "yes"), classes) == 1
    assert class_index(Instance("a", "x", 1), classes) == 1
    assert class_index(Instance("a", "x", 1), {"1": 0, "2": 1}) == 0  # a number that names a class is that class
    for label in (2, "maybe"):
        with pytest.raises(DataError, match=f"label {label!r} is not one of the backbone's 2 classes"):
            class_index(Instance("a", "x", label), classes)


def test_classes_are_named_by_either_mapping():
    config = PretrainedConfig()
    config.id2label, config.label2id = {0: "no", 1: "yes"}, None
    assert labels_of(config) == {"no": 0, "yes": 1}
    config.label2id = {"yes": 0, "no": 1}
    assert labels_of(config) == config.label2id
