"""Files of inputs: answered in order, malformed lines passed over, a run that was cut off goes on."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.inference.bulk import rows_of, run_file
from sd_gym.tasks import cache
from tests.test_leaving import trained

ROWS = 24


@pytest.fixture
def model(tmp_path, tiny_tokenizer):
    *_, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    loaded = sd_gym.load(tmp_path / "artefact")
    yield loaded, texts
    sd_gym.detach(loaded.model)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file, rows):
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def test_each_row_is_answered_in_order_as_in_one_call(model, tmp_path):
    model, texts = model
    source = write(tmp_path / "in.jsonl", [{"review": text} for text in texts])
    seen = []
    bulk = run_file(
        model,
        source,
        tmp_path / "out" / "o.jsonl",
        columns={"text": "review"},
        chunk=10,
        on_chunk=lambda rows, _: seen.append(rows),
    )
    wanted, came = model(texts), lines_of(tmp_path / "out" / "o.jsonl")
    assert seen == [10, 20, 24]
    assert [one["line"] for one in came] == list(range(1, ROWS + 1))
    assert [one["answer"] for one in came] == [one.answer for one in wanted]
    np.testing.assert_array_equal([one["skip"] for one in came], [one.skip for one in wanted])
    assert bulk.rows == ROWS
    assert bulk.figures()["FLOPs"] == f"{np.mean([one.flops_ratio for one in wanted]):.1%} of dense"


@pytest.mark.parametrize("dense", [False, True])
def test_no_more_rows_run_together_than_asked_for(model, dense):
    model, texts = model
    sizes = []
    layer = model.model.base_model.encoder.layer[0].attention.self  # deciding, which embeds all of them, ends before it
    handle = layer.register_forward_hook(lambda _, args, output: sizes.append(len(output[0])))
    wanted = model(texts, dense=dense)
    together, sizes[:] = max(sizes), []
    came = model(texts, dense=dense, batch_size=5)
    handle.remove()
    assert together > 5
    assert 1 <= max(sizes) <= 5
    assert [one.answer for one in came] == [one.answer for one in wanted]
    np.testing.assert_array_equal([one.skip for one in came], [one.skip for one in wanted])


def test_what_is_answered_is_kept_in_no_cache(model, tmp_path, monkeypatch):
    model, texts = model
    monkeypatch.setattr(cache, "SMALLEST", 1)
    monkeypatch.setenv("SD_GYM_CACHE", str(tmp_path / "cache"))
    model(texts)
    assert not (tmp_path / "cache").exists()


def test_a_malformed_line_stops_no_other(model, tmp_path):
    model, texts = model
    rows = [{"text": texts[0]}, "{broken\n", {"text": 3}, "[1]\n", {"text": texts[1]}]
    bulk = run_file(model, write(tmp_path / "in.jsonl", rows), tmp_path / "o.jsonl")
    came = lines_of(tmp_path / "o.jsonl")
    assert ["error" in one for one in came] == [False, True, True, True, False]
    assert came[1]["error"].startswith("not JSON")
    assert (
        came[2]["error"]
        == "expected text and text_pair (which may be missing), each a text that is not empty; got {'text': 3}"
    )
    assert came[3]["error"] == "expected a JSON object, got list"
    assert [line.number for line in bulk.malformed] == [2, 3, 4]


def test_a_run_that_was_cut_off_goes_on_behind_the_last_whole_line(model, tmp_path):
    model, texts = model
    source, output = write(tmp_path / "in.jsonl", [{"text": text} for text in texts]), tmp_path / "o.jsonl"
    run_file(model, source, tmp_path / "whole.jsonl", chunk=5)

    def cut(rows, bulk):
        if rows == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_file(model, source, output, chunk=5, on_chunk=cut)
    assert not output.exists()
    part = tmp_path / "o.jsonl.part"
    part.write_text(part.read_text() + '{"line": 11, "ans')
    with pytest.raises(FileExistsError, match="--resume"):
        run_file(model, source, output)
    assert run_file(model, source, output, chunk=5, resume=True).rows == ROWS - 10
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not part.exists()
    with pytest.raises(FileExistsError, match="there already"):
        run_file(model, source, output)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("no.jsonl", None, "no file"),
        ("in.txt", "good food", "expected one of the formats .jsonl, .csv, .parquet"),
    ],
)
def test_an_input_that_cannot_be_read_leaves_nothing_behind(model, tmp_path, name, text, error):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=error):
        run_file(model[0], tmp_path / name, tmp_path / "out" / "o.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_column_of_a_field_that_is_none_is_refused(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"review": "good food"}])
    with pytest.raises(ValueError, match="no field 'txt'; the task's are text, text_pair, label"):
        run_file(model[0], source, tmp_path / "o.jsonl", columns={"txt": "review"})
    run_file(model[0], source, tmp_path / "o.jsonl", columns={"text": "review", "label": "stars"})
    assert "answer" in lines_of(tmp_path / "o.jsonl")[0]


def test_rows_are_counted_where_lines_tell_them(tmp_path):
    assert rows_of(write(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}, '{"text": "c"}'])) == 3
    assert rows_of(write(tmp_path / "in.csv", ["text\n", "a\n"])) is None
    assert rows_of(tmp_path / "no.jsonl") is None
    assert rows_of(None) is None


def test_the_command_says_what_to_do(model, tmp_path):
    source, artefact = write(tmp_path / "in.jsonl", [{"review": "good food"}]), str(tmp_path / "artefact")
    arguments = ["run", artefact, "--input", str(source), "--output"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "o.jsonl")])
    assert done.exit_code == 1
    assert "--column FIELD=COLUMN" in done.output
    done = CliRunner().invoke(app, [*arguments, "-"])
    assert done.exit_code == 2
    assert "expected a file" in done.output


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "-"])
def test_the_command_compares_with_dense(model, tmp_path, suffix):
    model, texts = model
    labels = [one.answer for one in model(texts)]  # so the policy is always right
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    source = write(tmp_path / "in.jsonl", rows)
    if suffix == "csv":
        source = write(tmp_path / "in.csv", ["text,label\n", *(f"{row['text']},{row['label']}\n" for row in rows)])
    given = source.read_text() if suffix == "-" else None
    arguments = ["run", str(tmp_path / "artefact"), "--input", "-" if suffix == "-" else str(source), "--compare"]
    done = CliRunner().invoke(
        app, [*arguments, "--batch-size", "5", "--output", str(tmp_path / "o.jsonl")], input=given
    )
    assert done.exit_code == 0, done.output
    assert "same answer as dense" in done.stdout
    assert "quality  1.0000, dense" in " ".join(done.stdout.split()).replace("quality ", "quality  ")
    assert len(lines_of(tmp_path / "o.jsonl")) == ROWS
    source.write_text("{broken\n") if suffix == "jsonl" else None
    if suffix == "jsonl":
        done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "p.jsonl")])
        assert done.exit_code == 1
        assert "line 1: not JSON" in done.output
