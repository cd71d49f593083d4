"""Bad data fails at once, and says where."""

import json

import pytest
from datasets import Dataset

from sd_gym.config import DataConfig
from sd_gym.errors import DataError
from sd_gym.tasks.data import load_split


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
    rows = "question,context,answers\nwho?,ben did,ben\nwhy?,ben did,\n"
    (tmp_path / "qa.csv").write_text(rows)
    instances = load_split(
        DataConfig(dataset=str(tmp_path / "qa.csv"), unanswerable=True), "question_answering", "train"
    )
    assert [instance.target for instance in instances] == ["ben", ""]
    (tmp_path / "qa.csv").write_text(rows.replace(",ben\n", ",['ben']\n"))  # a list, as pandas writes it
    with pytest.raises(DataError, match="line 2: answers must be a text, a list of texts"):
        load_split(str(tmp_path / "qa.csv"), "question_answering", "train")
    file.write_text(json.dumps({"document": "long", "summary": "short"}) + "\n")
    (instance,) = load_split(str(file), "summarization", "train")
    assert (instance.source, instance.target) == ("long", "short")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 0}\n{"text": oops\n', "line 2: not JSON"),
        ("[1, 2]\n", "line 1: expected a JSON object, got list"),
        ('{"text": "a"}\n', r"line 1: no field 'label'.* the columns are text: set columns=\{label: COLUMN\}"),
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


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"textpair": "b"}, "unknown field 'textpair'; did you mean 'text_pair'?"),
        ({"text_pair": "bb"}, r"no row has 'bb' \(for text_pair\); the columns are a, b, label"),
        ({"difficulty": "level"}, r"no row has 'level' \(for difficulty\)"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, message):
    (tmp_path / "data.jsonl").write_text(json.dumps({"a": "one", "b": "two", "label": 0}) + "\n")
    data = DataConfig(dataset=str(tmp_path / "data.jsonl"), columns={"text": "a", **columns})
    with pytest.raises(DataError, match=message):
        load_split(data, "classification", "train")


def test_an_empty_second_text_is_none_in_every_format(tmp_path):
    for name, rows in (
        ("a.jsonl", '{"text": "good", "text_pair": "", "label": 1}\n' * 10),
        ("b.csv", "text,text_pair,label\n" + "good, ,1\n" * 10),
    ):
        (tmp_path / name).write_text(rows)
        assert {one.source_pair for one in load_split(str(tmp_path / name), "classification", "train")} == {None}


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


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_other_formats(tmp_path, suffix):
    rows = Dataset.from_dict({"body": [f"the food {n}" for n in range(20)], "label": [n % 2 for n in range(20)]})
    for split in ("train", "validation"):
        file = tmp_path / f"{split}.{suffix}"
        rows.to_csv(file) if suffix == "csv" else rows.to_parquet(file)
    instances = load_split(
        DataConfig(dataset=str(tmp_path), columns={"text": "body"}, train_size=7), "classification", "train"
    )
    assert [one.source for one in instances] == [f"the food {n}" for n in range(7)]
    single = DataConfig(
        dataset=str(tmp_path / f"train.{suffix}"), columns={"text": "body"}, splits={"train": "train[-3:]"}
    )
    assert [one.source for one in load_split(single, "classification", "train")] == [
        f"the food {n}" for n in range(17, 20)
    ]


def test_a_name_with_signs_of_patterns_is_just_a_name(tmp_path):
    for name, source in (("reviews[2]", "mine"), ("reviews2", "other")):
        rows = Dataset.from_dict({"text": [f"{source} {n}" for n in range(4)], "label": [0, 1, 0, 1]})
        rows.to_parquet(tmp_path / f"{name}.parquet")
    config = DataConfig(dataset=str(tmp_path / "reviews[2].parquet"))
    assert [one.source for one in load_split(config, "classification", "train")] == [f"mine {n}" for n in range(4)]
    (tmp_path / "c[2]").mkdir()
    (tmp_path / "c[2]" / "data-train.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="rename the folder"):
        load_split(DataConfig(dataset=str(tmp_path / "c[2]")), "classification", "train")
