"""The rows of splits: reported, compared, and in one split only unless the user allows more."""

import json
from dataclasses import replace

import gymnasium as gym
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from sd_gym.agents.experiment.run import train
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.config import SPLITS, ConfigError, DataConfig
from sd_gym.data.instance import Instance
from sd_gym.errors import DataError
from sd_gym.tasks import data, splits
from sd_gym.tasks.data import Instances, load_split
from sd_gym.tasks.splits import Splits
from tests.conftest import write_mirror

CUSTOM = "SD/Classification-Custom-v0"
CUT = {"validation": "train[-10:]", "test": "train[:5]"}


def write(file, texts, label=0):
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text in texts))
    return str(file)


def splits_of(dataset, **values):
    return Splits(DataConfig(dataset=str(dataset), **values), "classification")


def texts_of(splits, *names):
    return [{one.source for one in splits[name]} for name in names]


def test_what_is_cut_off_a_split_is_taken_out_of_it(reviews):
    splits = splits_of(reviews, splits=CUT)
    assert [len(splits[name]) for name in SPLITS] == [25, 10, 5]
    assert [splits[name].part for name in SPLITS] == ["train[5:30]", "train[30:40]", "train[0:5]"]
    assert not set.intersection(*texts_of(splits, "train", "validation"))


@given(ends=st.lists(st.tuples(*[st.none() | st.integers(-12, 12)] * 2), min_size=2, max_size=2))
def test_no_row_is_lost_and_none_is_in_two_splits(ends, tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write(file, [f"text {number}" for number in range(10)])
    named = ["train[{}:{}]".format(*("" if end is None else end for end in pair)) for pair in ends]
    source = DataConfig(dataset=str(file), splits=dict(zip(("validation", "test"), named, strict=True)))
    sliced = [range(10)[slice(*pair)] for pair in ends]
    whole = [pair == (None, None) for pair in ends]
    cut = {row for rows, all_of_it in zip(sliced, whole, strict=True) if not all_of_it for row in rows}
    for name, rows in zip(SPLITS, (sorted({*range(10)} - cut), *map(list, sliced)), strict=True):
        if rows:
            assert load_split(source, "classification", name).rows == rows
        else:
            with pytest.raises(DataError, match=f"the split '{name}' .* is empty: .* none of the 10 rows"):
                load_split(source, "classification", name)


def test_the_form_of_a_hub_data_set_is_cut_likewise(tmp_path):
    rows = [Dataset.from_dict({"text": [f"{split} {n}" for n in range(20)], "label": [0] * 20}) for split in "ab"]
    source = write_mirror(tmp_path, "sst2", dict(zip(("train", "test"), rows, strict=True)))
    splits = splits_of(source, subset="sst2", splits={"validation": "train[-5:]"})
    assert [splits[name].part for name in SPLITS] == ["train[0:15]", "train[15:20]", "test[0:20]"]
    with pytest.raises(FileNotFoundError, match=r"no split 'validation'. It has test, train"):
        splits_of(source, subset="sst2")["validation"]


def test_a_file_whose_name_has_hyphens_and_dots(tmp_path):
    write(tmp_path / "train.jsonl", ["text"])
    write(tmp_path / "my-reviews.2.jsonl", [f"text {number}" for number in range(10)])
    splits = splits_of(tmp_path, splits={"validation": "my-reviews.2[:5]", "test": "my-reviews.2[5:]"})
    assert [splits[name].part for name in SPLITS[1:]] == ["my-reviews.2[0:5]", "my-reviews.2[5:10]"]


def test_who_names_both_splits_of_a_row_is_told(reviews):
    with pytest.raises(DataError, match=r"10 of the 40 rows of train \(train\[0:40\]\) are also in validation"):
        splits_of(reviews, splits={"train": "train", "validation": "train[-10:]", "test": "train[:0]"})["train"]


def overlapping(tmp_path):
    write(tmp_path / "train.jsonl", ["a", "b", "c", "d", "e"])
    write(tmp_path / "validation.jsonl", ["d", "f", "g"], label=1)  # the label does not matter
    write(tmp_path / "test.jsonl", ["g ", "h", "a"])  # nor do spaces around
    return tmp_path


def test_texts_in_two_splits_are_an_error_that_names_them_their_number_and_what_to_do(tmp_path):
    words = (
        r"1 of the 5 rows of train \(train\[0:5\]\) are also in validation \(validation\[0:3\]\); 1 of the 5 rows of "
        r"train .* in test .*; 1 of the 3 rows of validation .* in test .*overlap=drop .*overlap=allow"
    )
    for name in SPLITS:
        with pytest.raises(DataError, match=words):
            splits_of(overlapping(tmp_path))[name]


def test_overlap_is_dropped_from_what_comes_before_the_test(tmp_path):
    splits = splits_of(overlapping(tmp_path), overlap="drop")
    assert texts_of(splits, *SPLITS) == [{"b", "c", "e"}, {"d", "f"}, {"g ", "h", "a"}]
    assert [splits[name].dropped for name in SPLITS] == [2, 1, 0]
    assert [one.id for one in splits["train"]] == ["train-1", "train-2", "train-4"]
    assert splits["train"].rows == [1, 2, 4]


def test_overlap_that_is_allowed_is_told_and_kept(tmp_path):
    splits = splits_of(overlapping(tmp_path), overlap="allow")
    with pytest.warns(UserWarning, match="overlap, as overlap=allow says: 1 of the 5 rows of train"):
        assert splits["train"].also_in == {"validation": 1, "test": 1}
    assert splits["test"].provenance["also_in"] == {"train": 1, "validation": 1}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": "train[-:5]"}, "expected a split such as 'train' or"),
        ({"valdation": "train[-10:]"}, r"unknown split 'valdation'; did you mean 'validation'\?"),
        ({"validation": "train[::2]"}, "expected a split such as"),
    ],
)
def test_misspelt_splits_are_refused_with_the_config(splits, message, reviews, tiny_backbone):
    with pytest.raises(ConfigError, match=message):
        gym.make(CUSTOM, dataset=str(reviews), backbone=str(tiny_backbone), splits=splits)


def test_a_split_that_the_data_set_does_not_have(reviews, tmp_path):
    folder = overlapping(tmp_path)
    (folder / "test.jsonl").rename(folder / "tets.jsonl")
    with pytest.raises(
        FileNotFoundError, match=r"no split 'test'; did you mean 'tets'\? It has reviews, tets, train, validation"
    ):
        splits_of(folder, overlap="drop")["test"]
    with pytest.raises(FileNotFoundError, match=r"no split 'trian'; did you mean 'train'\?"):
        splits_of(folder, splits={"test": "trian[:2]"}, overlap="drop")["test"]
    with pytest.raises(FileNotFoundError, match=r"no split 'test'.* all 'train'.* splits={test: \"train\[-1000:\]\"}"):
        splits_of(reviews, splits={"validation": "train[-10:]"})["test"]


def test_a_folder_without_a_test_file_can_be_learned_on_but_not_silently_tested(tmp_path, tiny_backbone):
    write(tmp_path / "train.jsonl", ["the food", "the room"])
    write(tmp_path / "validation.jsonl", ["food", "room"])
    settings = {"dataset": str(tmp_path), "backbone": str(tiny_backbone)}
    gym.make(CUSTOM, **settings).reset(seed=0)
    with pytest.raises(FileNotFoundError, match="no split 'test'"):
        train(CUSTOM, "dense", tmp_path / "run", steps=1, **settings)
    assert not (tmp_path / "run").exists()  # refused before anything is learned or written
    with pytest.raises(DataError, match=r"2 of the 2 rows of validation .* are also in test"):
        sd_gym.train(CUSTOM, "dense", tmp_path / "run", **settings, splits={"test": "validation"})
    with pytest.warns(UserWarning, match=r"2 of the 2 rows of validation .* are also in test"):
        result = sd_gym.train(
            CUSTOM, "dense", tmp_path / "run", **settings, splits={"test": "validation"}, overlap="allow"
        )
    assert result["data"]["test"]["also_in"] == {"validation": 2}
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")]).output
    assert "(test split, 2 instances, 2 of them also in validation)" in " ".join(shown.split())


def test_a_result_says_which_rows_it_is_of(reviews, tiny_backbone, tmp_path):
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone), "splits": CUT}
    result = sd_gym.train(CUSTOM, "dense", tmp_path / "run", steps=1, **settings)
    reported = result["data"]["test"]
    assert (reported["file"], reported["part"], reported["instances"]) == (str(reviews), "train[0:5]", 5)
    written = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert {name: one["hash"] for name, one in written.items()} == {
        name: one["hash"] for name, one in result["data"].items()
    }
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")]).output
    assert f"test:5instances,train[0:5]of{reviews},hash{reported['hash']}" in "".join(shown.split())
    first = sd_gym.instances(CUSTOM, "validation", **settings)[0]
    assert (first["id"], first["row"]) == ("validation-0", f"{reviews}, row 31")


def test_each_split_is_made_once(reviews, monkeypatch):
    read, made, inner = [], [], data.read_rows
    monkeypatch.setattr(data, "read_rows", lambda *given: read.append(given[0]) or inner(*given))
    cut = splits_of(reviews, splits=CUT)
    assert [cut[name] is cut[name] for name in SPLITS] == [True] * 3
    assert read == [reviews]
    load = splits.load_split
    monkeypatch.setattr(splits, "load_split", lambda *given, **keys: made.append(given[2]) or load(*given, **keys))
    generated = Splits(DataConfig(dataset="procedural", test_size=20), "classification")
    assert generated["test"] is generated["test"]
    assert made == ["test"]


def test_the_list_of_envs_says_what_is_tested_on():
    shown = CliRunner().invoke(app, ["envs"]).output
    # Here a terminal is narrow, so that a row has several lines.
    row = " ".join(shown[shown.index("SD/Classification-SST2-v0") : shown.index("SD/Classification-STSB-v0")].split())
    assert "nyu-mll/glue," in row
    assert "tested on its" in row


@pytest.mark.parametrize("change", [{"source": "other"}, {"target": 1}, {"difficulty": 3}, {"source_pair": "x"}])
def test_a_hash_is_of_all_that_the_data_say(change):
    one = Instance("train-0", "text", 0)
    assert Instances([replace(one, **change)]).hash != Instances([one]).hash
    assert Instances([replace(one, id="test-4")]).hash == Instances([one]).hash  # the same row in another split
