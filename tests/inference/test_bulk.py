"""Files of inputs: answered in order, malformed lines passed over, a run that was cut off goes on."""

import json
import os
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification
from typer.testing import CliRunner

import sd_gym
from benchmarks.end_to_end import Dense
from sd_gym.cli import app
from sd_gym.errors import DataError
from sd_gym.inference.answer import TextModel
from sd_gym.inference.bulk import Bulk, count_rows, run_file
from sd_gym.tasks.files import read_jsonl
from tests.conftest import TINY, WORDS
from tests.envs.conftest import MODELS, trained
from tests.inference.conftest import cut_off, lines_of, write

ROWS = 24


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


def test_what_the_benchmark_calls_dense_runs_everything(model, tmp_path):
    model, texts = model
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    run_file(Dense(model), source, tmp_path / "o.jsonl")
    came, wanted = lines_of(tmp_path / "o.jsonl"), model.answers(texts, dense=True)
    assert not np.any([one["skip"] for one in came])
    assert [one["answer"] for one in came] == [one.answer for one in wanted]


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


def test_an_output_without_answers_is_not_kept(model, tmp_path):
    write(tmp_path / "in.jsonl", [{"review": text} for text in model[1]])
    command = ["run", str(tmp_path / "artefact"), "--input", str(tmp_path / "in.jsonl")]
    command += ["--output", str(tmp_path / "o.jsonl")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "no line was answered" in done.output
    assert "Answers:" not in done.output
    cut_off(model[0], tmp_path / "in.jsonl", tmp_path / "o.jsonl")
    done = CliRunner().invoke(app, [*command, "--resume"])
    assert done.exit_code == 1
    assert "no line was answered" in done.output
    assert not (tmp_path / "o.jsonl").exists()
    done = CliRunner().invoke(app, [*command, "--column", "text=review"])
    assert done.exit_code == 0, done.output
    assert len(lines_of(tmp_path / "o.jsonl")) == ROWS


def test_half_a_character_is_an_error_of_its_row(model, tmp_path):
    model, texts = model
    source = write(tmp_path / "in.jsonl", [{"text": texts[0]}, {"text": "bad \ud800"}, {"text": texts[1]}])
    run_file(model, source, tmp_path / "o.jsonl")
    came = lines_of(tmp_path / "o.jsonl")
    assert [one.get("answer") for one in came] == [model(texts[:1])[0].answer, None, model(texts[1:2])[0].answer]
    assert came[1]["error"].startswith("text has half a character at place 5")
    with pytest.raises(ValueError, match="input 1: text has half a character"):
        model([texts[0], "bad \ud800"])


def test_blank_lines_are_skipped_as_in_training(model, tmp_path):
    model, texts = model
    source = write(tmp_path / "in.jsonl", ["\n", {"text": texts[0]}, " \t\n", {"text": texts[1]}, "\n"])
    assert run_file(model, source, tmp_path / "o.jsonl").malformed == []
    assert [one["line"] for one in lines_of(tmp_path / "o.jsonl")] == [2, 4]
    assert [place.rpartition(" ")[2] for place, _ in read_jsonl(source)] == ["2", "4"]


def test_a_warning_says_once_how_many_inputs_have_unknown_words(model, tmp_path):
    model, texts = model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(texts)
    rows = ["xylophone", texts[0], "good zzz zzz"]
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in rows])
    with pytest.warns(UserWarning, match="2 of 3 inputs have words that the backbone's tokenizer does not know"):
        run_file(model, source, tmp_path / "o.jsonl", chunk=1)
    assert [one["unknown_tokens"] for one in lines_of(tmp_path / "o.jsonl")] == [1, 0, 2]
    with pytest.warns(UserWarning, match="2 of 3 inputs"):
        model(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(rows)
    done = CliRunner().invoke(
        app, ["run", str(tmp_path / "artefact"), "--input", str(source), "--output", str(tmp_path / "p.jsonl")]
    )
    assert done.exit_code == 0
    assert done.stderr.count("2 of 3 inputs have words") == 1


def test_a_question_that_is_too_long_is_an_error_of_its_row(tmp_path, tiny_tokenizer):
    *_, texts = trained("extracted", None, tmp_path, tiny_tokenizer)
    model, rows = sd_gym.load(tmp_path / "artefact"), texts[:3]
    rows[1] = {**rows[1], "question": "food " * 40}
    run_file(model, write(tmp_path / "in.jsonl", rows), tmp_path / "o.jsonl", compare=True)
    came = lines_of(tmp_path / "o.jsonl")
    assert ["error" in one for one in came] == [False, True, False]
    assert came[1]["error"].startswith("the input: the question alone has")


def test_rows_that_bart_cannot_classify_together_are_answered_apart(tmp_path, tiny_tokenizer, monkeypatch):
    """It pools the last end token, of which all rows of a batch must have as many."""
    special = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("bart", **special, **TINY["bart"])
    config.id2label, config.label2id = {0: "0", 1: "1"}, {"0": 0, "1": 1}
    make = partial(AutoModelForSequenceClassification.from_config, config)
    monkeypatch.setitem(MODELS, "classification", (make, "SD/Classification-Custom-v0"))
    *_, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    model = sd_gym.load(tmp_path / "artefact")
    rows = [{"text": texts[0]}, {"text": texts[1], "text_pair": texts[2]}, {"text": f"{texts[3]} [SEP] food"}]
    run_file(model, write(tmp_path / "in.jsonl", rows * 2), tmp_path / "o.jsonl")
    alone = [model([tuple(one.values()) if len(one) == 2 else one["text"]])[0] for one in rows * 2]
    came = lines_of(tmp_path / "o.jsonl")
    assert [one["answer"] for one in came] == [one.answer for one in alone]
    assert [one["skip"] for one in came] == [one.skip.tolist() for one in alone]
    with pytest.raises(DataError, match=r"input 1 has 2 tokens \[SEP\], input 0 has 1; this backbone needs as many"):
        model([texts[0], (texts[1], texts[2])])


CELLS = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=5), st.none(), st.integers(), st.lists(st.none(), max_size=1)
)
ROW = st.dictionaries(st.sampled_from(["text", "text_pair", "label", "x"]), CELLS, max_size=3).map(json.dumps)
LINES = st.lists(st.one_of(ROW.map(str.encode), st.binary(max_size=8), st.just(b" ")), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=LINES, suffix=st.sampled_from([".jsonl", ".csv"]), cut=st.integers(1, 4), stray=st.binary(max_size=9))
def test_any_input_gives_its_rows_in_order_or_an_error_and_a_cut_changes_nothing(model, lines, suffix, cut, stray):
    model, content = model[0], b"\n".join(lines)
    with TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, whole, output = (Path(name) / one for one in (f"in{suffix}", "whole", "output"))
        source.write_bytes(content if suffix == ".jsonl" else b"text,label\n" + content)
        try:
            bulk = run_file(model, source, whole, compare=True, chunk=2)
        except DataError:
            assert suffix == ".csv"
            return
        came = lines_of(whole)
        if suffix == ".jsonl":
            told = enumerate(content.split(b"\n"), start=1)
            assert [one["line"] for one in came] == [number for number, line in told if not blank(line, number)]
        assert sum("error" in one for one in came) == len(bulk.malformed) == len(came) - bulk.rows
        if len(came) < 2 * cut:
            return
        part = cut_off(model, source, output, after=came[2 * cut - 1]["line"], chunk=2)
        with (part / "answers.jsonl").open("ab") as file:
            file.write(stray)
        resumed = run_file(model, source, output, chunk=3, resume=True)
        assert output.read_bytes() == whole.read_bytes()
        assert resumed.before + resumed.rows == bulk.rows
        assert [(one.number, one.error) for one in resumed.malformed] == [
            (one.number, one.error) for one in bulk.malformed
        ]


def blank(line, number):
    try:
        return not line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError:
        return False


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


def test_rows_may_come_from_a_pipe(model, tmp_path):
    pipe, rows = tmp_path / "pipe", [json.dumps({"text": text}) + "\n" for text in model[1]]
    os.mkfifo(pipe)
    writer = Thread(target=lambda: pipe.write_text("".join(rows)))
    writer.start()
    assert run_file(model[0], pipe, tmp_path / "o.jsonl").rows == ROWS
    writer.join()


def test_a_column_of_a_field_that_is_none_is_refused(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"review": "good food"}])
    with pytest.raises(ValueError, match="no field 'txt'; the task's are text, text_pair, label"):
        run_file(model[0], source, tmp_path / "o.jsonl", columns={"txt": "review"})
    run_file(model[0], source, tmp_path / "o.jsonl", columns={"text": "review", "label": "stars"})
    assert "answer" in lines_of(tmp_path / "o.jsonl")[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_column_that_no_row_has_is_not_ignored(model, tmp_path, suffix):
    lines = ["text\n", "good\n", "bad\n"] if suffix == ".csv" else [{"text": "good"}, {"text": "bad"}]
    source, columns = write(tmp_path / f"in{suffix}", lines), {"label": "stars"}
    if suffix == ".jsonl":
        with pytest.warns(UserWarning, match=r"no row has 'stars' \(for label\)"):
            run_file(model[0], source, tmp_path / "o", columns=columns)
    else:
        bulk = run_file(model[0], source, tmp_path / "o", columns=columns)
        assert [line.error for line in bulk.malformed] == ["no column 'stars' (for label); the columns are 'text'"] * 2


def test_a_row_without_the_named_column_is_an_error_not_another_text(model, tmp_path):
    rows = [{"text": "good food", "review": "bad food"}, {"text": "good food"}]
    source = write(tmp_path / "in.jsonl", rows)
    run_file(model[0], source, tmp_path / "o.jsonl", columns={"text": "review", "label": "stars"})
    first, second = lines_of(tmp_path / "o.jsonl")
    assert "answer" in first
    assert second["error"] == "no column 'review' (for text); the columns are 'text'"


STARS = {0: "1", 1: "2", 2: "3"}
WORDED = {0: "-", 1: "+"}
FLOATS = {0: "1.0", 1: "2.0"}


class Judge(TextModel):
    """Answers nothing: it only compares answers with what is right."""

    def _answers(self, texts, dense, batch_size):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("head", "names", "answer", "right", "quality"),
    [
        ("label", STARS, "1", 1, 1.0),  # a number that is a class's name is that class, as in the env
        ("label", STARS, "1", 1.0, 1.0),
        ("label", STARS, "3", 1, 0.0),
        ("label", STARS, "1", 0, None),
        ("label", WORDED, "+", 1.0, 1.0),
        ("label", WORDED, "+", "-", 0.0),
        ("label", WORDED, "+", "no class", None),
        ("label", WORDED, "+", 2, None),
        ("label", WORDED, "+", 0.5, None),
        ("label", WORDED, "+", ["+"], None),
        ("label", WORDED, "+", None, None),
        ("label", WORDED, "+", True, None),
        ("label", {0: "None", 1: "some"}, "None", None, None),
        ("label", FLOATS, "1.0", 1.0, 1.0),
        ("label", FLOATS, "1.0", 1, 0.0),  # an index
        ("seq2seq", WORDED, "None", None, None),
        ("score", {}, "2.50", 2.5, 1.0),
        ("score", {}, "2.50", 3, 0.9),
        ("score", {}, "2.50", 50, 0.0),
        ("score", {}, "2.50", float("nan"), None),
        ("score", {}, "2.50", "2.5", None),
        ("score", {}, "2.50", None, None),
        ("seq2seq", WORDED, "1", 1, 1.0),  # generated
    ],
)
def test_quality_is_that_of_the_env(head, names, answer, right, quality):
    model = Judge()
    model.task, model.metric, model.head, model.names, model.label_range = "classification", "squad", head, names, 5.0
    assert model.quality(answer, right) == pytest.approx(quality)


def test_an_empty_cell_is_a_question_without_answer():
    """As in training, and as an empty list."""
    model = Judge()
    model.task, model.metric, model.head = "question_answering", "squad", "span"
    for right in (None, [], {"text": []}):
        assert model.quality("", right) == 1.0
        assert model.quality("was", right) == 0.0


def test_a_row_without_reference_has_no_quality(model, tmp_path):
    model, texts = model
    rows = [{"text": text, "y": None} for text in texts[:2]]
    rows += [{"text": texts[0], "label": 1}, {"text": texts[1], "y": 1}]  # its label is in the column y alone
    source = write(tmp_path / "in.jsonl", rows)
    bulk = run_file(model, source, tmp_path / "o.jsonl", compare=True, columns={"label": "y"})
    assert len(bulk.agree) == 4
    assert len(bulk.quality) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_labels_of_another_column_are_read_as_in_training(model, tmp_path, suffix):
    model, texts = model
    rows = [(text, int(one.answer.removeprefix("LABEL_"))) for text, one in zip(texts, model(texts), strict=True)]
    lines = [{"text": text, "y": label} for text, label in rows]
    if suffix == ".csv":
        lines = ["text,y\n", *(f"{text},{label}\n" for text, label in rows)]
    source = write(tmp_path / f"in{suffix}", lines)
    bulk = run_file(model, source, tmp_path / "o.jsonl", compare=True, columns={"label": "y"})
    assert [own for own, _ in bulk.quality] == [1.0] * ROWS


def test_a_command_averages_its_rows_once(model, tmp_path, monkeypatch):
    averaged, figures = [], Bulk.figures
    monkeypatch.setattr(Bulk, "figures", lambda bulk: averaged.append(bulk.rows) or figures(bulk))
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in model[1]])
    arguments = ["run", str(tmp_path / "artefact"), "--input", str(source), "--output", str(tmp_path / "o.jsonl")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert averaged == [ROWS]


def test_rows_are_counted_where_lines_tell_them(tmp_path):
    assert count_rows(write(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}, '{"text": "c"}'])) == 3
    assert count_rows(write(tmp_path / "in.csv", ["text\n", "a\n"])) is None
    assert count_rows(tmp_path / "no.jsonl") is None
    assert count_rows(None) is None


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
    assert "quality 1.0000, dense" in " ".join(done.stdout.split())
    assert len(lines_of(tmp_path / "o.jsonl")) == ROWS
    if suffix == "jsonl":
        source.write_text("{broken\n")
        done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "p.jsonl")])
        assert done.exit_code == 1
        assert "line 1: not JSON" in done.output
