"""Files are whole or not there, and damaged ones are named."""

import pytest
import torch

from sd_gym.files import (
    file_states,
    map_arrays,
    read_checkpoint,
    read_json,
    read_tensors,
    write_checkpoint,
    write_json,
    write_tensors,
)
from tests.conftest import small_disk

VALUES = {"x": torch.zeros(100_000)}


@pytest.mark.parametrize(
    ("write", "value"), [(write_tensors, VALUES), (write_checkpoint, VALUES), (write_json, [0] * 100_000)]
)
def test_files_on_a_full_disk(tmp_path, write, value):
    file = tmp_path / "file"
    write(file, value)
    before = file.read_bytes()
    with small_disk(1000), pytest.raises(OSError, match=rf"(File too large: '|cannot write ){file}"):
        write(file, value)
    assert file.read_bytes() == before  # what was there is still whole
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_written_again_in_a_subfolder_is_noticed(tmp_path):
    (tmp_path / "data").mkdir()
    before = []
    for text in ("a", "bc"):
        (tmp_path / "data" / "train.parquet").write_text(text)
        before.append(file_states(tmp_path))
    assert before[0] != before[1]


def test_whoever_may_read_the_other_files_may_read_tensors(tmp_path):
    write_tensors(tmp_path / "values.safetensors", VALUES)
    write_json(tmp_path / "values.json", [0])
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"garbage")
    for read in (read_json, read_tensors, read_checkpoint):
        with pytest.raises(ValueError, match=rf"{file} is damaged"):
            read(file)


def test_a_type_of_numbers_that_is_not_known_is_damage(tmp_path):
    file = tmp_path / "file"
    write_tensors(file, VALUES)
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"U32"'))
    with pytest.raises(ValueError, match=rf"{file} is damaged"):
        map_arrays(file)


def test_a_folder_of_a_subset_changes_with_its_files(tmp_path):
    (tmp_path / "subset").mkdir()
    file = tmp_path / "subset" / "train.parquet"
    file.write_text("old")
    before = file_states(tmp_path)
    file.write_text("newer")
    assert before != file_states(tmp_path)
