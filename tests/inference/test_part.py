"""Answers that are not complete yet: resumed by the run that began them, and by no other."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import sd_gym
from sd_gym.folders import FolderInUseError
from sd_gym.inference.bulk import run_file
from sd_gym.inference.part import Line, Part
from tests.conftest import small_disk
from tests.inference.conftest import cut_off, everything, lines_of, write

ROWS = 24


def test_a_run_that_was_cut_off_goes_on_after_the_last_whole_chunk(model, tmp_path):
    model, texts = model
    source, output = write(tmp_path / "in.jsonl", [{"text": text} for text in texts]), tmp_path / "o.jsonl"
    run_file(model, source, tmp_path / "whole.jsonl", chunk=5)
    part = cut_off(model, source, output)
    with (part / "answers.jsonl").open("a") as file:
        file.write('{"line": 11, "answer": "x"}\n{"line": 12, "ans')
    with pytest.raises(FileExistsError, match="--resume"):
        run_file(model, source, output)
    assert run_file(model, source, output, chunk=5, resume=True).rows == ROWS - 10
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not part.exists()
    with pytest.raises(FileExistsError, match="there already"):
        run_file(model, source, output)


def test_a_run_that_was_cut_off_at_its_beginning_goes_on(model, tmp_path, monkeypatch):
    model, texts = model
    source, output = write(tmp_path / "in.jsonl", [{"text": text} for text in texts]), tmp_path / "o.jsonl"
    touch = Path.touch

    def killed(file, *arguments, **more):
        if file.name == "answers.jsonl":
            raise KeyboardInterrupt
        touch(file, *arguments, **more)

    monkeypatch.setattr(Path, "touch", killed)
    with pytest.raises(KeyboardInterrupt):
        run_file(model, source, output)
    monkeypatch.undo()
    assert everything(tmp_path / "o.jsonl.part").keys() == {".lock", "part.json"}
    assert run_file(model, source, output, resume=True).rows == ROWS


def test_a_run_that_was_cut_off_at_its_end_is_whole(model, tmp_path, monkeypatch):
    model, texts = model
    source, output = write(tmp_path / "in.jsonl", [{"text": text} for text in texts]), tmp_path / "o.jsonl"
    monkeypatch.setattr("sd_gym.inference.part.shutil", SimpleNamespace(rmtree=lambda folder: None))
    run_file(model, source, output)
    monkeypatch.undo()
    whole = output.read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        run_file(model, source, output, resume=True)
    assert not (tmp_path / "o.jsonl.part").exists()
    assert output.read_bytes() == whole


def test_a_full_disk_is_told_with_the_file(tmp_path):
    part = Part(tmp_path / "o.jsonl", {})
    full = pytest.raises(OSError, match=r"too large: '.*answers\.jsonl'")
    with part.held(iter([]), resume=False), small_disk(1000), full:
        part.add([Line(1, {})], "x" * 1001)


def test_one_run_at_a_time_writes_an_output(model, tmp_path):
    model, texts = model
    source, output = write(tmp_path / "in.jsonl", [{"text": text} for text in texts]), tmp_path / "o.jsonl"
    refused = []

    def beside(rows, bulk):
        for resume in (True, False):
            with pytest.raises(FolderInUseError):
                run_file(model, source, output, resume=resume)
            refused.append(rows)

    run_file(model, source, output, chunk=10, on_chunk=beside)
    assert refused == [10, 10, 20, 20, 24, 24]
    assert [one["line"] for one in lines_of(output)] == list(range(1, ROWS + 1))


def test_what_something_else_has_begun_is_not_resumed(model, tmp_path):
    model, texts = model
    rows = [{"text": text, "other": text} for text in texts]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "o.jsonl"
    part = cut_off(model, source, output)
    before = everything(part)
    bolder = sd_gym.load(model.policy.with_margin(-1.0))
    shorter = write(tmp_path / "shorter.jsonl", rows[:7])
    changed = write(tmp_path / "changed.jsonl", [{"text": "good"}, *rows[1:]])
    for arguments, options, error in [
        ((bolder, source), {}, r"another policy \(or operating point\)"),
        ((model, source), {"columns": {"text": "other"}}, "another --column"),
        ((model, shorter), {}, "up to line 10"),
        ((model, changed), {}, "other rows than the first 10 lines"),
    ]:
        with pytest.raises(ValueError, match=error):
            run_file(*arguments, output, resume=True, **options)
        assert everything(part) == before
    (part / "answers.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="was changed"):
        run_file(model, source, output, resume=True)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("kind", ["file", "link", "link to a folder", "folder", "state", "linked answers"])
def test_what_was_not_written_by_a_run_stays_as_it_is(model, tmp_path, kind, resume):
    model, texts = model
    source, output = write(tmp_path / "in.jsonl", [{"text": text} for text in texts]), tmp_path / "o.jsonl"
    part, mine = tmp_path / "o.jsonl.part", tmp_path / "mine"
    if kind in ("state", "linked answers"):
        cut_off(model, source, output)
    else:
        mine.mkdir()
    if kind == "file":
        part.write_text("mine, and half a line")
    elif kind == "link":
        part.symlink_to(write(tmp_path / "notes.txt", ["mine, and half a line"]))
    elif kind == "link to a folder":
        part.symlink_to(mine)
    elif kind == "folder":
        part.mkdir()
        (part / "notes.txt").write_text("mine")
    elif kind == "state":
        (part / "part.json").write_text('{"line": 3}')
    else:
        (part / "answers.jsonl").rename(mine)
        (part / "answers.jsonl").symlink_to(mine)
    before = everything(part) if part.is_dir() else part.read_text()
    error = "--resume" if kind == "state" and not resume else "was not written by sd-gym run"
    with pytest.raises(FileExistsError, match=error):
        run_file(model, source, output, resume=resume)
    assert (everything(part) if part.is_dir() else part.read_text()) == before
    assert not output.exists()
