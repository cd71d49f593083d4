"""Bad data fails at once, and says where."""

import json

import pytest

from sd_gym.backbones.heads.label import class_index
from sd_gym.data.instance import Instance
from sd_gym.tasks.data import DataError, load_split


def test_a_single_file_is_divided_by_row(reviews):
    parts = {name: load_split(str(reviews), "classification", name) for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 32, "validation": 4, "test": 4}
    assert parts["validation"][0].source == json.loads(reviews.read_text().splitlines()[8])["text"]


def test_a_folder_is_read_by_split(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split, "label": 1}) + "\n\n")
        assert load_split(str(tmp_path), "classification", split)[0].source == split


def test_question_answering_and_summarization_fields(tmp_path):
    file = tmp_path / "qa.jsonl"
    row = {"question": "who?", "context": "ben did", "answers": {"text": ["ben", "b"], "answer_start": [0, 0]}}
    file.write_text(json.dumps(row) + "\n")
    (instance,) = load_split(str(file), "question_answering", "train")
    assert (instance.source, instance.source_pair, instance.target) == ("who?", "ben did", "ben")
    file.write_text(json.dumps({"document": "long", "summary": "short"}) + "\n")
    (instance,) = load_split(str(file), "summarization", "train")
    assert (instance.source, instance.target) == ("long", "short")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 0}\n{"text": oops\n', "line 2: not JSON"),
        ("[1, 2]\n", "line 1: expected a JSON object, got list"),
        ('{"text": "a"}\n', "line 1: no field 'label'"),
        ('{"text": 7, "label": 0}\n', "line 1: text must be a text, got 7"),
        ('{"text": "a", "text_pair": 7, "label": 0}\n', "line 1: text_pair must be a text, got 7"),
        ('{"text": " ", "label": 0}\n', "the split 'train' .* is empty: all 1 rows have empty texts"),
        ('{"text": "a", "label": true}\n', "line 1: label must be a class index"),
        ('{"text": "a", "label": -1}\n', "line 1: label must be a class index"),
        ("", "the split 'train' .* is empty"),
        ("\n\n", "the split 'train' .* is empty"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        load_split(str(file), "classification", "train")


@pytest.mark.parametrize(
    ("task", "full", "empty"),
    [
        ("classification", {"text": "a", "label": 0}, {"text": " "}),
        ("summarization", {"document": "a b", "summary": "a"}, {"document": ""}),
        ("summarization", {"document": "a b", "summary": "a"}, {"summary": None}),
        ("question_answering", {"question": "q", "context": "c", "answers": ["c"]}, {"context": "\n"}),
    ],
)
def test_empty_texts_are_left_out_and_counted(tmp_path, task, full, empty):
    rows = [full, {**full, **empty}, full, {**full, **empty}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    instances = load_split(str(tmp_path), task, "train")
    assert [instance.id for instance in instances] == ["train-0", "train-2"]
    assert instances.left_out == 2


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl.*expected a JSONL, CSV or Parquet file"):
        load_split(str(tmp_path / "missing.jsonl"), "classification", "train")
    with pytest.raises(FileNotFoundError, match=r"no train.jsonl"):
        load_split(str(tmp_path), "classification", "train")


def test_a_hub_id_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="pass the path of a local copy as dataset="):
        load_split("nobody/nothing", "classification", "train")


def test_labels_outside_the_classes():
    classes = {"no": 0, "yes": 1}
    assert class_index(Instance("a", "x", "yes"), classes) == 1
    assert class_index(Instance("a", "x", 1), classes) == 1
    for label in (2, "maybe"):
        with pytest.raises(DataError, match=f"label {label!r} is none of the backbone's 2 classes"):
            class_index(Instance("a", "x", label), classes)
