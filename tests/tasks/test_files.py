"""Rows of JSON lines, CSV and Parquet, as they are in the file."""

import pyarrow
import pyarrow.parquet
import pytest

from sd_gym.errors import DataError
from sd_gym.tasks.data import load_split

NOT_MISSING = ["NA", "null", "None", "nan", "N/A", "123", "1e5", "True", ""]


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    for suffix, head in ((".jsonl", b'{"text": "a", "label": 0}\n'), (".csv", b"text,label\n")):
        file = tmp_path / f"data{suffix}"
        file.write_bytes(head + b"\n" + b'{"text": "caf\xe9", "label": 0}\n')
        with pytest.raises(DataError, match=rf"data{suffix}, line 3: not UTF-8 .*save the file as UTF-8"):
            load_split(str(file), "classification", "train")


@pytest.mark.parametrize("hub", [False, True])
def test_cells_of_a_csv_are_texts_whatever_they_look_like(tmp_path, hub):
    lines = "text,label\n" + "".join(f'"{text}",{number % 2}\n' for number, text in enumerate(NOT_MISSING))
    folder = tmp_path / "data"
    (folder / "data").mkdir(parents=True)
    if hub:  # a folder in the hub's own form, which the library reads
        (folder / "data" / "train-00000-of-00001.csv").write_text(lines)
    else:
        (folder / "train.csv").write_text(lines)
    instances = load_split(str(folder), "classification", "train")
    assert [instance.source for instance in instances] == NOT_MISSING[:-1]
    assert [instance.target for instance in instances] == [0, 1] * 4
    assert instances.left_out == 1


def test_labels_of_a_csv_are_numbers_only_where_all_are(tmp_path):
    for labels, expected in (
        ("1 2", [1, 2]),
        ("0.5 2", [0.5, 2.0]),
        ("1 NA", ["1", "NA"]),
        ("1e5x 2", ["1e5x", "2"]),
    ):
        (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels.split()))
        assert [one.target for one in load_split(str(tmp_path), "classification", "train")] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,0\na,b,1\n", r"line 3: expected 2 cells \(text, label\), got 3"),
        ("text,label\na,0\na\n", r"line 3: expected 2 cells \(text, label\), got 1"),
        ('text,label\n"a,0\n', "not CSV"),
        ("text,text\na,0\n", "two columns have the same name"),
        ("text,label\na,\n", "line 2: label must be a class index"),
        ("", "is empty"),
    ],
)
def test_a_csv_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        load_split(str(tmp_path), "classification", "train")


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\n", encoding="utf-8-sig")
    (tmp_path / "validation.jsonl").write_text('{"text": "a", "label": 0}\n', encoding="utf-8-sig")
    for split in ("train", "validation"):
        assert load_split(str(tmp_path), "classification", split)[0].source == "a"


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"], [0]], names=["text", "text", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match="two columns have the same name; the columns are text, text, label"):
        load_split(str(tmp_path), "classification", "train")


def test_garbage_parquet_is_refused(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1garbage")
    with pytest.raises(DataError, match=r"train\.parquet: cannot be read as Parquet"):
        load_split(str(tmp_path), "classification", "train")
