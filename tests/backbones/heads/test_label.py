"""Classes of labels."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import f1_score
from transformers import PretrainedConfig

from sd_gym.backbones.heads.label import LabelHead, labels_of
from sd_gym.config import DataConfig
from sd_gym.data.instance import Instance, NamedClass
from sd_gym.errors import BackboneError, DataError
from sd_gym.tasks.data import load_split
from tests.conftest import write_mirror


def indices(classes, *labels):
    return LabelHead(classes)._labels([Instance("a", "x", label) for label in labels]).tolist()


def test_labels_outside_the_classes():
    classes = {"no": 0, "yes": 1}
    assert indices(classes, "yes", 1, 0) == [1, 1, 0]
    for label in (2, "maybe"):
        with pytest.raises(DataError, match=f"label {label!r} is not one of the backbone's 2 classes: no, yes"):
            indices(classes, "no", label)


def test_numbers_are_names_where_classes_have_numbers():
    """Whatever the other rows are: a split that lacks some classes is read as the others."""
    stars = {"1": 0, "2": 1, "3": 2}
    assert indices(stars, 1, 3) == indices(stars, "1", "3") == [0, 2]
    assert indices(stars, NamedClass.of(1, ("bad", "good"))) == [1]  # always an index
    with pytest.raises(DataError, match="label 0 is not one of the backbone's 3 classes: 1, 2, 3"):
        indices(stars, 1, 0)


def test_classes_are_named_by_either_mapping():
    config = PretrainedConfig()
    config.id2label, config.label2id = {0: "no", 1: "yes"}, None
    assert labels_of(config) == {"no": 0, "yes": 1}
    for label2id in ({"yes": 0, "no": 1}, {"LABEL_0": 0, "LABEL_1": 1}):  # answers are named by the other one
        config.label2id = label2id
        assert labels_of(config) == {"no": 0, "yes": 1}
    config.label2id = {"no": 0, "yes": 1, "true": 1}
    assert labels_of(config) == config.label2id
    config.id2label, config.label2id = {0: "LABEL_0", 1: "yes"}, {"no": 0, "yes": 1}
    assert labels_of(config) == config.label2id
    config.id2label, config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"yes": 0, "no": 1}
    assert labels_of(config) == config.label2id
    config.id2label, config.label2id = {0: "no", 1: "no", 2: "yes"}, {"no": 1, "yes": 2}
    assert labels_of(config) == config.label2id


def test_classes_in_the_order_of_the_data():
    head, names = LabelHead({"pos": 0, "other": 1, "neg": 2}), ("neg", "pos")
    instances = [Instance("a", "x", NamedClass.of(0, names)), Instance("b", "x", NamedClass.of(1, names))]
    assert head.in_data_order(np.array([2, 0, 1]), instances).tolist() == [0, 1, -1]
    assert head.in_data_order(np.array([2, 0]), [Instance("a", "x", "neg")]).tolist() == [2, 0]


def test_f1_is_of_the_class_1_of_the_data(reviews, tiny_backbone):
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone), "metric": "f1"}
    split = gym.make("SD/Classification-Custom-v0", **settings).unwrapped.core.split("train")
    rows, labels = np.arange(len(split)), split.encoded.labels.numpy()
    nothing = np.zeros((len(rows), len(split.backbone.board) + 1), dtype=np.int64)
    said = split.passes.in_passes(rows, nothing, lambda logits, _: logits.argmax(dim=1))
    assert split.scoring.metrics(rows, nothing) == {"f1": pytest.approx(f1_score(labels, said))}
    names = ("LABEL_1", "LABEL_0")
    for row, label in enumerate(labels):
        split.instances[row] = replace(split.instances[row], target=NamedClass.of(1 - label, names))
    assert split.scoring.metrics(rows, nothing) == {"f1": pytest.approx(f1_score(labels == 0, said == 0))}


def test_a_classifier_whose_answers_are_sets_of_classes_is_refused(reviews, tiny_backbone, tmp_path):
    backbone = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    file = backbone / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"problem_type": "multi_label_classification"}))
    with pytest.raises(BackboneError, match="its answers are sets of classes"):
        gym.make("SD/Classification-Custom-v0", dataset=str(reviews), backbone=str(backbone))


def test_a_class_of_a_hub_data_set_is_found_by_its_name(tmp_path):
    """GLUE's MNLI and most models tuned on it order the same three classes differently."""
    names = ["entailment", "neutral", "contradiction"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"text": ["a b", "c", "d"], "label": [0, 1, 2]}, features=features)
    dataset = write_mirror(tmp_path, "default", {"train": rows})
    instances = load_split(DataConfig(dataset=dataset, subset="default"), "classification", "train")
    other_order = LabelHead({"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2})
    assert other_order._labels(pickle.loads(pickle.dumps(list(instances)))).tolist() == [2, 1, 0]
    without_names = LabelHead({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
    assert without_names._labels(instances).tolist() == [0, 1, 2]


@pytest.mark.parametrize("names", [["b", "B", "c"], ["x", "y", "z"]])
def test_names_that_do_not_tell_the_classes_apart_leave_indices(names):
    instances = [Instance(str(index), "x", NamedClass.of(index, tuple(names))) for index in range(3)]
    assert LabelHead({"c": 0, "b": 1, "a": 2})._labels(instances).tolist() == [0, 1, 2]


def test_names_that_are_no_texts_are_not_used(tmp_path):
    """YAML reads "no" and "yes" as truth values."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a b", "c"], "label": [0, 1]}, features=features)
    dataset = Path(write_mirror(tmp_path, "default", {"train": rows}))
    card = (dataset / "README.md").read_text()
    info = "dataset_info:\n  config_name: default\n  features:\n  - name: text\n    dtype: string\n  - name: label\n"
    info += "    dtype:\n      class_label:\n        names:\n          '0': no\n          '1': yes\n"
    (dataset / "README.md").write_text(card[: card.rindex("---")] + info + "---\n")
    instances = load_split(DataConfig(dataset=str(dataset), subset="default"), "classification", "train")
    assert LabelHead({"no": 0, "yes": 1})._labels(instances).tolist() == [0, 1]
