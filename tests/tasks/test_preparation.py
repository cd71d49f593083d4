"""Preparing backbones for every task, and going on after an interruption."""

import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from sd_gym.backbones.heads.label import stored_labels
from sd_gym.backbones.load import load_model
from sd_gym.backbones.prepare import Recipe
from sd_gym.cli import app
from sd_gym.config import BackboneConfig, DataConfig
from sd_gym.data.instance import Instance, NamedClass
from sd_gym.envs.shared import shared_core
from sd_gym.tasks import preparation
from sd_gym.tasks.classification import classes
from sd_gym.tasks.preparation import prepare_backbone
from sd_gym.tasks.splits import Splits
from tests.conftest import CutError, make_model, save


@pytest.fixture
def reports(tmp_path):
    rows = [{"document": f"the {w} was {x}", "summary": w} for w in ("food", "room") for x in ("good", "bad")] * 10
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "reports.jsonl")


def test_a_generator_becomes_robust_to_skipping(reports, tmp_path, tiny_tokenizer):
    output = tmp_path / "prepared"
    generator = save(make_model("t5"), tiny_tokenizer, tmp_path / "generator")
    options = ["--env", "SD/Summarization-Custom-v0", "--set", "overlap=allow"]
    options += ["--steps", 150, "--learning-rate", 0.01, "--output", output]
    arguments = ["prepare", "--backbone", generator, "--dataset", reports, *options]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    report = json.loads((output / "preparation.json").read_text())
    assert report["quality"]["after"]["0.0"] > 0.9 > report["quality"]["before"]["0.0"]
    assert report["quality"]["after"]["0.4"] > report["quality"]["before"]["0.4"]
    assert not list(output.glob("checkpoint*"))
    assert (output / "preparation.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(output)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/distillation",
        "train/learning_rate",
        "validation/quality",
    }
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 151))
    measured = [(event.step, event.value) for event in events.Scalars("validation/quality")]
    assert measured == [(one["step"], pytest.approx(one["quality"])) for one in report["validation"]]


def test_a_regression_has_one_output(tmp_path, tiny_backbone):
    rows = [{"text": ["bad", "fine", "good"][n % 3], "label": [0.5, 2.5, 4.5][n % 3]} for n in range(40)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataConfig(dataset=str(tmp_path / "scores.jsonl"), overlap="allow")
    settings = {"recipe": Recipe(120, 0.01), "label_range": 5.0, "rows": 1.0}
    backbone = BackboneConfig(name=str(tiny_backbone))
    report = prepare_backbone(backbone, source, "classification", tmp_path / "prepared", **settings)
    assert report["quality"]["after"]["0.0"] > 0.8  # always the middle, 2.5, would have 0.73
    config = json.loads((tmp_path / "prepared" / "config.json").read_text())
    assert list(config["label2id"]) == ["score"]


def test_a_preparation_that_was_cut_off_is_resumed_with_the_same_result(tmp_path, reviews, tiny_backbone):
    def cut(step, figures):
        if step == 25:
            raise CutError

    settings = {"recipe": Recipe(40, 0.003), "checkpoint_minutes": 0}
    arguments = (BackboneConfig(name=str(tiny_backbone)), DataConfig(dataset=str(reviews)), "classification")
    prepare_backbone(*arguments, tmp_path / "whole", **settings)
    with pytest.raises(CutError):
        prepare_backbone(*arguments, tmp_path / "cut", **settings, on_step=cut)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="holds another preparation: its backbone_rows is"):
        prepare_backbone(*arguments, tmp_path / "cut", **settings, rows=0.9, resume=True)
    other = DataConfig(dataset=str(reviews), unanswerable=not arguments[1].unanswerable)
    with pytest.raises(ValueError, match="holds another preparation: its unanswerable is"):
        prepare_backbone(arguments[0], other, arguments[2], tmp_path / "cut", **settings, resume=True)
    steps, phases = [], []
    told = {"on_step": lambda step, *_: steps.append(step), "on_phase": phases.append}
    prepare_backbone(*arguments, tmp_path / "cut", **settings, resume=True, **told)
    assert phases == ["preparing", "evaluating"]  # the quality before is known
    reports = [json.loads((tmp_path / name / "preparation.json").read_text()) for name in ("whole", "cut")]
    assert reports[0] == reports[1]
    assert steps == list(range(25, 41))  # the last checkpoint was written after step 24
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    curves = [EventAccumulator(str(tmp_path / name)).Reload().Scalars("train/loss") for name in ("whole", "cut")]
    assert [(event.step, event.value) for event in curves[0]] == [(event.step, event.value) for event in curves[1]]


def test_a_decoder_without_padding_token_learns_to_classify(reviews, tmp_path, tiny_tokenizer):
    model = make_model("gpt2")
    model.config.pad_token_id = None
    save(model, tiny_tokenizer, tmp_path / "decoder")
    settings = {"recipe": Recipe(80, 0.003), "rows": 1.0}
    arguments = BackboneConfig(name=str(tmp_path / "decoder")), DataConfig(dataset=str(reviews)), "classification"
    report = prepare_backbone(*arguments, tmp_path / "out", **settings)
    assert report["quality"]["after"]["0.0"] == 1.0
    options = {"dataset": str(reviews), "backbone": str(tmp_path / "out"), "policy_rows": "all"}
    env = gym.make("SD/Classification-Custom-v0", **options)
    split = env.unwrapped.core.split("train")
    dense = np.zeros((32, len(split.backbone.board) + 1), dtype=np.int64)
    assert split.scoring.run(np.arange(32), dense).mean() == 1.0


def test_weights_are_saved_before_they_are_evaluated(tmp_path, reviews, tiny_backbone):
    phases, output = [], tmp_path / "out"
    prepare_backbone(
        BackboneConfig(name=str(tiny_backbone)),
        DataConfig(dataset=str(reviews)),
        "classification",
        output,
        Recipe(2),
        on_phase=lambda phase: phases.append((phase, (output / "model.safetensors").exists())),
    )
    assert phases == [("evaluating", False), ("preparing", False), ("evaluating", True)]


def test_without_a_terminal_plain_lines_say_what_is_done(tmp_path, reviews, tiny_backbone):
    options = ["--backbone", tiny_backbone, "--dataset", reviews, "--output", tmp_path / "out", "--steps", 2]
    result = CliRunner().invoke(app, ["prepare", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.endswith("...")] == [
        "evaluating ...",
        "preparing ...",
        "evaluating ...",
    ]


def test_the_least_important_layers_are_reported_and_measured(tmp_path, reviews, tiny_backbone):
    options = ["--backbone", tiny_backbone, "--dataset", reviews, "--output", tmp_path / "out", "--steps", 20]
    options += ["--draw", "layers", "--accumulate", 2]
    result = CliRunner().invoke(app, ["prepare", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert "60% of layers, the least important" in " ".join(result.output.split())
    report = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert sorted(report["importance"]) == [0, 1, 2]
    after = report["quality"]["after"]
    assert after["0.2"] == after["0.4"]  # one of three layers


def test_no_skipping_is_dense_fine_tuning(tmp_path, reviews, tiny_backbone):
    figures = []
    settings = {"on_step": lambda step, shown: figures.append(shown), "rows": 1.0}
    arguments = BackboneConfig(name=str(tiny_backbone)), DataConfig(dataset=str(reviews)), "classification"
    report = prepare_backbone(*arguments, tmp_path / "dense", Recipe(60, 0.003, max_rate=0.0), **settings)
    assert report["quality"]["after"]["0.0"] == 1.0
    assert all(one["distillation"] == 0 for one in figures)


def test_what_was_left_out_and_cut_is_reported(tmp_path, tiny_backbone):
    rows = [{"text": "the food was good", "label": 1}, {"text": "bad", "label": 0}, {"text": " ", "label": 0}] * 4
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--steps", 1, "--max-length", 5, "--output", tmp_path / "out", "--dataset", tmp_path]
    options += ["--set", "overlap=allow", "--rows", 1]
    result = CliRunner().invoke(app, [str(a) for a in ["prepare", "--backbone", tiny_backbone, *options]])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "4 rows left out (an empty text), 4 inputs cut" in shown
    assert "backbone overlaps validation: 8 of its 8 instances are in both" in shown
    report = json.loads((tmp_path / "out" / "preparation.json").read_text())
    counted = {"instances": 8, "cut_inputs": 4, "cut_targets": 0, "left_out": 4, "dropped": 0}
    assert counted.items() <= report["rows"]["held out"].items()


def test_prepared_again_a_part_of_the_data_keeps_its_rows_and_other_data_are_divided_anew(tmp_path, tiny_backbone):
    def prepared(backbone, words, name, rows):
        lines = [json.dumps({"text": f"the food was good {word}", "label": word % 2}) + "\n" for word in words]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        data = DataConfig(dataset=str(tmp_path / f"{name}.jsonl"))
        given = BackboneConfig(name=str(backbone), max_source_length=16)
        report = prepare_backbone(given, data, "classification", tmp_path / name, Recipe(1), rows=rows)
        return report["rows"]["backbone"]["instances"]

    assert prepared(tiny_backbone, range(40), "first", 0.5) == 16  # of 32 in the training split
    assert prepared(tmp_path / "first", range(39, 79), "other", 0.5) in (16, 17)  # they share one row
    assert prepared(tmp_path / "first", range(20), "part", 1.0) < 16


def test_rows_to_validate_on_are_from_the_whole_of_a_sorted_file(tmp_path, monkeypatch):
    rows = [{"text": f"the food was good {number}", "label": number // 60} for number in range(120)]
    (tmp_path / "sorted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(preparation, "HELD_OUT", 10)
    splits = Splits(DataConfig(dataset=str(tmp_path / "sorted.jsonl")), "classification")
    held_out, _ = preparation._parts(splits, "mini", 0.5, None)["held out"]
    assert 3 <= sum(int(instance.target) for instance in held_out) <= 7
    assert len(held_out) == 10


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, reviews, tiny_backbone):
    """Each runs batches of its own; the first one writes."""
    # accelerate's own launcher starts several processes on GPUs only; torch's, which it calls there, on CPUs too.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sd_gym.cli"]
    arguments = ["prepare", "--backbone", tiny_backbone, "--dataset", reviews, "--learning-rate", 0.003]
    arguments += ["--steps", 250, "--batch-size", 8, "--draw", "layers", "--output", tmp_path / "out"]
    command = [sys.executable, *launch, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Prepared backbone") == 1
    report = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert report["processes"] == 2
    assert report["quality"]["after"]["0.0"] == 1.0
    assert len(list((tmp_path / "out").glob("events*"))) == 1


def test_the_wrong_kind_of_backbone_is_refused(tmp_path, reports, tiny_backbone):
    with pytest.raises(ValueError, match="does not generate text, which summarization needs"):
        prepare_backbone(
            BackboneConfig(name=str(tiny_backbone)),
            DataConfig(dataset=reports, overlap="allow"),
            "summarization",
            tmp_path / "out",
            Recipe(1),
        )


def test_unknown_env_is_refused(tmp_path):
    arguments = ["prepare", "--backbone", "x", "--output", str(tmp_path / "o"), "--env", "SD/Clasification-SST2-v0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "did you mean 'SD/Classification-SST2-v0'" in " ".join((result.output + result.stderr).split())


def test_a_backbone_is_tuned_under_a_policy(tmp_path, reviews, tiny_backbone):
    """The policy sees what it saw before, and its decisions lose less."""
    prepared, run, tuned = (tmp_path / name for name in ("prepared", "run", "tuned"))
    backbone = BackboneConfig(name=str(tiny_backbone))
    prepare_backbone(
        backbone, DataConfig(dataset=str(reviews)), "classification", prepared, Recipe(120, 0.003), rows=1.0
    )
    overrides = {"dataset": str(reviews), "backbone": str(prepared), "rate": 0.7, "policy_rows": "all"}
    train("SD/Classification-Custom-v0", "hash", run, steps=1, **overrides)
    options = ["--policy", run, "--output", tuned, "--steps", 150, "--learning-rate", 0.003]
    result = CliRunner().invoke(app, ["prepare", *map(str, options), "--set", "train_size=24"])
    assert result.exit_code == 0, result.output
    assert json.loads((tuned / "preparation.json").read_text())["data"]["train"]["instances"] == 24  # not the run's 32
    _, before, policy = load_run(run)
    backbone = before.config.backbone.model_copy(update={"name": str(tuned)})
    after = shared_core(before.config.model_copy(update={"backbone": backbone}))
    rows = np.arange(len(before.split("train")))
    observations = before.observe(before.split("train"), rows)
    np.testing.assert_array_equal(after.observe(after.split("train"), rows), observations)
    skip = np.pad(policy.skip_logits(observations) > 0, ((0, 0), (0, 1))).astype(int)
    skip[:, 1] = skip[:, 4] = 1  # around the policy, not only its very decisions
    assert after.split("train").scoring.run(rows, skip).mean() >= before.split("train").scoring.run(rows, skip).mean()
    assert after.split("train").dense_loss.mean() < 0.3
    weights = [load_file(folder / "model.safetensors") for folder in (prepared, tuned)]
    assert not torch.equal(*(part["bert.encoder.layer.0.output.dense.weight"] for part in weights))


def test_a_run_has_its_own_backbone(tmp_path):
    options = ["--policy", "run", "--output", str(tmp_path / "o"), "--set", "backbone=other"]
    result = CliRunner().invoke(app, ["prepare", *options])
    assert result.exit_code == 2
    assert "leave out backbone=" in " ".join((result.output + result.stderr).split())


@pytest.mark.parametrize("key", ["backbone.name", "data.dataset", "backbone.max_source_length"])
def test_a_key_is_given_as_an_option_or_by_set(key, tmp_path):
    options = ["--backbone", "x", "--dataset", "y", "--max-length", "8", "--output", str(tmp_path / "o")]
    result = CliRunner().invoke(app, ["prepare", *options, "--set", f"{key.removesuffix('.name')}=16"])
    assert result.exit_code == 2
    assert f"{key} is given as an option and by --set" in " ".join((result.output + result.stderr).split())


def test_either_a_backbone_or_a_policy(tmp_path):
    for options in ([], ["--backbone", "x", "--policy", "y"]):
        result = CliRunner().invoke(app, ["prepare", "--output", str(tmp_path / "o"), *options])
        assert result.exit_code == 2
        assert "pass either --backbone, or --policy" in " ".join((result.output + result.stderr).split())


@pytest.mark.parametrize("stored_as", ["float32", "bfloat16"])
def test_a_stored_head_keeps_its_order_of_classes_and_is_tuned_in_float32(stored_as, tmp_path, tiny_tokenizer):
    model = make_model("bert")
    model.config.id2label, model.config.label2id = {0: "positive", 1: "negative"}, {"positive": 0, "negative": 1}
    stored = save(model.to(getattr(torch, stored_as)), tiny_tokenizer, tmp_path / "stored")
    rows = [{"text": f"food {n}", "label": ["positive", "negative"][n % 2]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = BackboneConfig(name=str(stored)), DataConfig(dataset=str(tmp_path / "rows.jsonl")), "classification"
    prepare_backbone(*arguments, tmp_path / "prepared", recipe=Recipe(2, 0.003))
    prepared, _ = load_model(str(tmp_path / "prepared"))
    assert prepared.config.id2label == {0: "positive", 1: "negative"}
    assert prepared.dtype == torch.float32


ORDERS = {  # classes of a stored head, those of the data, and those of the prepared head
    "the head's order": (["positive", "negative"], ("negative", "positive"), ["positive", "negative"]),
    "another case": (["POSITIVE", "NEGATIVE"], ("negative", "positive"), ["positive", "negative"]),
    "more classes": (["Other", "POSITIVE", "NEGATIVE"], ("negative", "positive"), ["Other", "positive", "negative"]),
    "no names": (["LABEL_0", "LABEL_1"], ("positive", "negative"), ["positive", "negative"]),
    "other names": (["ham", "spam"], ("positive", "negative"), ["positive", "negative"]),
}


@pytest.mark.parametrize("known_by", ["names", "words"])
@pytest.mark.parametrize(("stored", "named", "prepared"), ORDERS.values(), ids=ORDERS)
def test_classes_keep_the_order_that_a_stored_head_has(known_by, stored, named, prepared):
    targets = [NamedClass.of(index, named) for index in (0, 1)] if known_by == "names" else named
    train = [Instance(str(number), "x", target) for number, target in enumerate(targets)]
    labels = {name: index for index, name in enumerate(stored)}
    expected = {name: index for index, name in enumerate(prepared)}
    if known_by == "words" and stored[-1].lower() not in expected:
        expected = {name: index for index, name in enumerate(sorted(named))}
    assert (stored_labels(labels, train) or classes(train)) == expected


def test_numbers_are_indices_or_names_of_a_stored_head():
    train = [Instance(str(rating), "x", rating) for rating in (1, 2)]
    assert stored_labels({"1": 0, "2": 1}, train) == {"1": 0, "2": 1}
    assert stored_labels({"bad": 0, "good": 1}, train) is None
    train.append(Instance("0", "x", 0))
    assert stored_labels({"bad": 0, "good": 1, "great": 2}, train) == {"bad": 0, "good": 1, "great": 2}
    assert stored_labels({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, train) is None


def prepared_classifier(folder, model, tokenizer, rows, **settings):
    """The configuration after one step, and the report."""
    stored = save(model, tokenizer, folder / "stored")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(dataset=str(folder / "rows.jsonl"), overlap="allow")
    recipe = Recipe(1, 1e-9, **settings)
    report = prepare_backbone(BackboneConfig(name=str(stored)), data, "classification", folder / "prepared", recipe)
    return load_model(str(folder / "prepared"))[0].config, report


def test_a_stored_head_is_not_replaced_where_the_data_write_its_classes_otherwise(tmp_path, tiny_tokenizer):
    model = make_model("bert")
    model.config.id2label, model.config.label2id = {0: "POSITIVE", 1: "NEGATIVE"}, {"POSITIVE": 0, "NEGATIVE": 1}
    with torch.no_grad():  # its answer is always POSITIVE
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    rows = [{"text": f"food {n}", "label": "positive" if n % 4 else "negative"} for n in range(80)]
    config, report = prepared_classifier(tmp_path, model, tiny_tokenizer, rows)
    assert report["quality"]["before"]["0.0"] > 0.5
    assert config.id2label == {0: "positive", 1: "negative"}


@pytest.mark.parametrize(("labels", "expected"), [([0, 1], "single_label_classification"), ([0.5, 1.5], "regression")])
def test_the_kind_of_problem_is_stored_for_other_programs(labels, expected, tmp_path, tiny_tokenizer):
    rows = [{"text": f"food {n}", "label": labels[n % 2]} for n in range(40)]
    config, _ = prepared_classifier(tmp_path, make_model("bert"), tiny_tokenizer, rows)
    assert config.problem_type == expected


def test_layers_are_skipped_by_the_recipe_alone(tmp_path, reports, tiny_tokenizer, monkeypatch):
    model, trained = make_model("bart"), []
    model.config.encoder_layerdrop = 1.0
    stored = save(model, tiny_tokenizer, tmp_path / "stored")
    layer = type(model.model.encoder.layers[0])
    forward = layer.forward

    def noted(self, *args, **kwargs):
        trained.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", noted)
    arguments = BackboneConfig(name=str(stored)), DataConfig(dataset=reports, overlap="allow"), "summarization"
    prepare_backbone(*arguments, tmp_path / "prepared", Recipe(1, 1e-3, max_rate=0.0))
    assert any(trained)
    assert load_model(str(tmp_path / "prepared"))[0].config.encoder_layerdrop == 1.0
