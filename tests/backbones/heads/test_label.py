"""Classes of labels."""

import pytest

from sd_gym.backbones.heads.label import class_index
from sd_gym.data.instance import Instance
from sd_gym.tasks.data import DataError


def test_labels_outside_the_classes():
    classes = {"no": 0, "yes": 1}
    assert class_index(Instance("a", "x", "yes"), classes) == 1
    assert class_index(Instance("a", "x", 1), classes) == 1
    for label in (2, "maybe"):
        with pytest.raises(DataError, match=f"label {label!r} is not one of the backbone's 2 classes"):
            class_index(Instance("a", "x", label), classes)
