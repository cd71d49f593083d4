"""Preparing backbones for every task, and going on after an interruption."""

import json

import pytest
from typer.testing import CliRunner

from sd_gym.cli import app
from sd_gym.tasks.data import Source
from sd_gym.tasks.preparation import prepare_backbone
from tests.conftest import make_model


@pytest.fixture
def tiny_generator(tmp_path, tiny_tokenizer):
    make_model("t5").save_pretrained(tmp_path / "generator")
    tiny_tokenizer.save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


@pytest.fixture
def reports(tmp_path):
    rows = [{"document": f"the {w} was {x}", "summary": w} for w in ("food", "room") for x in ("good", "bad")] * 10
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "reports.jsonl")


def test_a_generator_learns_to_bear_skipping(reports, tiny_generator, tmp_path):
    output = tmp_path / "prepared"
    options = ["--env", "SD/Summarization-Custom-v0", "--steps", 150, "--learning-rate", 0.01, "--output", output]
    arguments = ["prepare", "--backbone", tiny_generator, "--dataset", reports, *options]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    report = json.loads((output / "preparation.json").read_text())
    assert report["quality"]["after"]["0.0"] > 0.9 > report["quality"]["before"]["0.0"]
    assert report["quality"]["after"]["0.4"] > report["quality"]["before"]["0.4"]
    assert not list(output.glob("checkpoint*"))


def test_a_regression_has_one_output(tmp_path, tiny_backbone):
    rows = [{"text": ["bad", "fine", "good"][n % 3], "label": [0.5, 2.5, 4.5][n % 3]} for n in range(40)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(tmp_path / "scores.jsonl"))
    settings = {"steps": 120, "learning_rate": 0.01, "label_range": 5.0}
    report = prepare_backbone(str(tiny_backbone), source, "classification", tmp_path / "prepared", **settings)
    assert report["quality"]["after"]["0.0"] > 0.8  # always the middle, 2.5, would have 0.73
    config = json.loads((tmp_path / "prepared" / "config.json").read_text())
    assert list(config["label2id"]) == ["score"]


def test_a_preparation_that_was_cut_off_goes_on_as_if_nothing_had_happened(tmp_path, reviews, tiny_backbone):
    class CutError(Exception):
        pass

    def cut(step, figures):
        if step == 25:
            raise CutError

    settings = {"steps": 40, "learning_rate": 0.003}
    arguments = (str(tiny_backbone), Source(str(reviews)), "classification")
    prepare_backbone(*arguments, tmp_path / "whole", **settings)
    with pytest.raises(CutError):
        prepare_backbone(*arguments, tmp_path / "cut", **settings, on_step=cut)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    steps = []
    prepare_backbone(*arguments, tmp_path / "cut", **settings, resume=True, on_step=lambda step, *_: steps.append(step))
    assert steps == list(range(25, 41))  # the last checkpoint was written after step 24
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_the_wrong_kind_of_backbone_is_refused(tmp_path, reports, tiny_backbone):
    with pytest.raises(ValueError, match="does not generate text, which summarization needs"):
        prepare_backbone(str(tiny_backbone), Source(reports), "summarization", tmp_path / "out", steps=1)


def test_unknown_env_is_refused(tmp_path):
    arguments = ["prepare", "--backbone", "x", "--output", str(tmp_path / "o"), "--env", "SD/Clasification-SST2-v0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "did you mean 'SD/Classification-SST2-v0'" in " ".join((result.output + result.stderr).split())
