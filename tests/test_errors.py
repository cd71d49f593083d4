"""What goes wrong is one line that says what to do: no traceback, no markup, nothing executed, nobody asked."""

import ast
import errno
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sd_gym.agents.experiment.run import train
from typer.testing import CliRunner

import sd_gym
from sd_gym.backbones import Recipe
from sd_gym.backbones.load import load_model, save_backbone
from sd_gym.cli import app
from sd_gym.config import BackboneConfig, DataConfig
from sd_gym.errors import DataError
from sd_gym.tasks.data import load_split
from sd_gym.tasks.family import LONGEST_TEXT
from sd_gym.tasks.preparation import prepare_backbone
from tests.agents.conftest import cut_off
from tests.conftest import small_disk, write_mirror

runner = CliRunner()
CUSTOM = "SD/Classification-Custom-v0"


def call(*arguments):
    """A call that has to fail as a user's does: the one line that it prints."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output + result.stderr
    *_, line = [line for line in result.stderr.splitlines() if line.strip()]  # others are progress bars
    assert re.match(r"\w*(Error|Exists|ID|Registered\w*): \S", line), line
    return line


def train_call(dataset, backbone, *settings, algo="ppo", output="run"):
    wanted = [f"dataset={dataset}", f"backbone={backbone}", *settings]
    return ["train", CUSTOM, "--algo", algo, "--steps", 64, "--output", output] + [
        part for setting in wanted for part in ("--set", setting)
    ]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_rows(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


COUNT = 16


def rows_of(split):
    return [{"text": f"the food was {split} {number}", "label": number % 2} for number in range(COUNT)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "the food was good", "label": 2}, "label 2 is not one of the backbone's 2 classes"),
        ({"text": "the food was good", "label": "maybe"}, "label 'maybe' is not one of the backbone's 2 classes"),
        ({"text": "the food was good", "label": 1, "difficulty": "hard"}, "difficulty must be a whole number"),
        ({"text": "\ud83d", "label": 1}, "text has half a character at place 1"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_wrong_rows_of_any_split_are_found_before_training(split, row, message, tmp_path, tiny_backbone, monkeypatch):
    for name in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows_of(name) + [row] * (name == split))
    monkeypatch.setattr("sd_gym.agents.ppo.agent.PPOAgent.learn", lambda *_: pytest.fail("it learned"))
    said = call(*train_call(tmp_path / "data", tiny_backbone))
    assert f"{split}.jsonl, line {COUNT + 1}" in said
    assert message in said
    assert not (tmp_path / "run" / "config.json").exists()


def test_preparing_finds_a_label_only_in_test_before_it_begins(tmp_path, tiny_backbone):
    for name in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows_of(name))
    write_rows(tmp_path / "data" / "test.jsonl", [*rows_of("test"), {"text": "fine", "label": 2}])
    steps = []
    with pytest.raises(DataError, match=r"test\.jsonl, line 17 .* label 2 is not one of the backbone's 2 classes"):
        prepare_backbone(
            BackboneConfig(name=str(tiny_backbone)),
            DataConfig(dataset=str(tmp_path / "data")),
            "classification",
            tmp_path / "out",
            Recipe(2),
            on_step=lambda step, *_: steps.append(step),
        )
    assert not steps


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a", "label": 0, "difficulty": 1.5}', "difficulty must be a whole number"),
        ('{"text": "a", "label": 0, "difficulty": true}', "difficulty must be a whole number"),
        ('{"text": "a", "label": 0, "difficulty": -1}', "difficulty must be a whole number"),
        ('{"text": "a", "label": 0, "difficulty": NaN}', "difficulty must be a whole number"),
        ('{"text": "a", "label": 0, "difficulty": Infinity}', "difficulty must be a whole number"),
        ('{"text": "a", "label": ""}', "label must be a class index"),
        ('{"text": "a", "label": 1' + "0" * 400 + "}", "label must be a class index"),
        ('{"text": "a", "label": 1' + "0" * 5000 + "}", "line 1: not JSON"),
        ('{"text": "a", "label": 1e300}', "label must be a class index"),
        ('{"text": "a", "label": NaN}', "label must be a class index"),
        ('{"text": "a", "label": "\\udc00"}', "label has half a character"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    (tmp_path / "train.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load_split(str(tmp_path), "classification", "train")
    assert f"{tmp_path / 'train.jsonl'}, line 1" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_levels_of_difficulty_may_be_whole_floats_or_missing(tmp_path):
    rows = [{"text": "a", "label": 0, "difficulty": value} for value in (2, 3.0, None)]
    write_rows(tmp_path / "train.jsonl", rows)
    instances = load_split(str(tmp_path), "classification", "train")
    assert [instance.difficulty for instance in instances] == [2, 3, 0]


def test_a_row_of_fifty_megabytes_is_refused(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"text": "a" * 50_000_000, "label": 0}])
    with pytest.raises(DataError, match=r"line 1: text has 50,000,000 characters, expected at most 2,000,000"):
        load_split(str(tmp_path), "classification", "train")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.csv").write_text("text,label\n" + "a" * (LONGEST_TEXT + 1) + ",0\n")
    with pytest.raises(DataError, match=r"line 2: text has 2,000,001 characters"):
        load_split(str(tmp_path), "classification", "train")


def test_highest_class_index_beyond_the_rows_is_refused(tmp_path, tiny_backbone):
    write_rows(tmp_path / "data.jsonl", [{"text": f"a {n}", "label": n % 2 * 1_000_000_000} for n in range(20)])
    prepare = ["prepare", "--backbone", tiny_backbone, "--dataset", tmp_path / "data.jsonl", "--output", "out"]
    assert "the highest class index is 1000000000, but the training split has only" in call(*prepare)


def test_every_load_forbids_code():
    loads = {"from_pretrained", "load_dataset"}
    root, found = Path(sd_gym.__file__).parent.parent, 0
    for file in [
        path for folder in ("sd_gym", "agents", "benchmarks", "examples") for path in root.glob(f"{folder}/**/*.py")
    ]:
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            name = getattr(node.func, "attr", getattr(node.func, "id", None)) if isinstance(node, ast.Call) else None
            of = getattr(node.func, "value", None) if isinstance(node, ast.Call) else None
            if (
                name in loads and getattr(of, "id", getattr(of, "attr", None)) != "SkipPolicy"
            ):  # which is our own, and loads tensors only
                found += 1
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                forbidden = getattr(given.get("trust_remote_code"), "value", None) is False
                options = None in given and '"trust_remote_code": False' in text  # passed as **options
                assert forbidden or options, f"{file}, line {node.lineno}"
    assert found >= 6


def test_a_data_set_with_a_script_runs_nothing_and_asks_nobody(tmp_path, monkeypatch):
    folder = Path(
        write_mirror(tmp_path / "data", "default", {"train": Dataset.from_dict({"text": ["a"], "label": [0]})})
    )
    (folder / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with suppress(DataError, FileNotFoundError):
        load_split(DataConfig(dataset=str(folder)), "classification", "train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["[/]", "[bold]", "[red]x", ":smile:x", "[link]"])
def test_messages_are_text_not_markup(name, tmp_path):
    (tmp_path / "data.jsonl").write_text("{}")
    assert f"no backbone folder at './{name}'" in call(*train_call("data.jsonl", f"./{name}"))
    assert f"no config.json in {name}" in call("evaluate", name)
    assert name in call("train", CUSTOM, "--set", name)
    assert name in call("train", name)


def test_results_are_printed_as_text(tmp_path, reviews, tiny_backbone):
    odd = shutil.copytree(tiny_backbone, tmp_path / "[bold]x")
    result = runner.invoke(app, [str(part) for part in train_call(reviews, odd, algo="dense", output="[/]run:smile:")])
    assert result.exit_code == 0, result.exception
    assert "Run folder: [/]run:smile:" in result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["penalty=[1"], "--set 'penalty=[1': not YAML"),
        (["penalty=2020-99-99"], "not YAML"),
        (["penalty={a: 1}"], "config key 'reward.penalty'"),
        (["columns={1: a, b: c}"], "config key 'data.columns"),
        (["max_source_length=99999999999999999999999"], "config key 'backbone.max_source_length'"),
        (["device=gpu"], "cannot use the device 'gpu': expected 'cpu'"),
        (["device=meta"], "cannot use the device 'meta'"),
        (["penalty"], "expected key=value, got 'penalty'"),
    ],
)
def test_wrong_settings(settings, message, reviews, tiny_backbone):
    assert message in call(*train_call(reviews, tiny_backbone, *settings))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id: Own/Bad-v0\ntask: [classification\n", "own.yaml: not YAML"),
        (b"id: Own/Bad-v0\ntask: caf\xe9\n", "own.yaml, line 2: not UTF-8"),
        (b"id: Own/Bad-v0\n1: 2\n", "unknown config key 1"),
        (b"id: Own/Bad-v0\n", "config key 'task'"),
    ],
)
def test_a_bad_yaml_file_is_named(content, message, tmp_path, own_names):
    (tmp_path / "own.yaml").write_bytes(content)
    (tmp_path / "registers_own.py").write_text("import sd_gym\nsd_gym.register_env('own.yaml')\n")
    assert message in call("train", "Own/Bad-v0", "--import", "registers_own.py")


def test_whatever_is_an_output_folder_works_or_is_told(tmp_path, reviews, tiny_backbone, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "choose a folder" in call(*train_call(reviews, tiny_backbone, output="file/run"))
    assert "choose a shorter name" in call(*train_call(reviews, tiny_backbone, output="x" * 300))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    model, tokenizer = load_model(str(tiny_backbone))
    save_backbone(model, tokenizer, Path("."))
    again, _ = load_model(str(tmp_path / "empty"))
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert not any(file.is_dir() for file in Path(".").iterdir())


@pytest.mark.parametrize("size", [0, 500, 20_000])
def test_training_on_a_full_disk(size, tmp_path, reviews, tiny_backbone):
    (tmp_path / "run").mkdir()
    with small_disk(size):
        said = call(*train_call(reviews, tiny_backbone, "n_steps=8", "num_envs=8"))
    assert "File too large" in said or "cannot write" in said


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES"])
def test_a_disk_that_cannot_be_written(code, reviews, tiny_backbone, monkeypatch):
    def fails(*_, **__):
        raise OSError(getattr(errno, code), "what the system says", "run")

    monkeypatch.setattr("pathlib.Path.mkdir", fails)
    said = call(*train_call(reviews, tiny_backbone))
    assert "what the system says: 'run'; " in said
    assert "free some space" in said or "choose a folder" in said


@pytest.mark.parametrize("minutes", [0, 10], ids=["of its checkpoint", "of its model"])
def test_preparing_on_a_full_disk(minutes, tmp_path, reviews, tiny_backbone):
    prepare = ["prepare", "--backbone", tiny_backbone, "--dataset", reviews, "--output", "out", "--steps", 2]
    prepare += ["--checkpoint-minutes", minutes]
    with small_disk(10_000):
        said = call(*prepare)
    assert "File too large" in said or "cannot write" in said
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.fixture
def resumption(tmp_path, reviews, tiny_backbone):
    """The call of a run that was killed after its first checkpoint."""
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone), "num_envs": 8, "n_steps": 8}
    cut_off(CUSTOM, "ppo", tmp_path / "run", steps=1024, **settings, after=500)
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train", CUSTOM, "--steps", 1024, "--output", "run", "--resume", *arguments]


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "foreign", "pickle"])
def test_damaged_checkpoints(damage, resumption, tmp_path):
    file = tmp_path / "run" / "checkpoint.pt"
    whole = file.read_bytes()
    if damage == "foreign":
        torch.save({"agent": {"parameters": {}}, "selection": 1}, file)
    elif damage == "pickle":
        torch.save({"agent": Path("x")}, file)
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"garbage" * 99, "empty": b""}[damage])
    said = call(*resumption)
    assert "weights_only" not in said
    assert "checkpoint.pt is damaged, so it cannot be resumed" in said
    assert "delete it and begin again" in said


def test_damaged_checkpoints_of_a_preparation(tmp_path, reviews, tiny_backbone):
    prepare = ["prepare", "--backbone", tiny_backbone, "--dataset", reviews, "--output", "out", "--steps", 2]
    prepare += ["--checkpoint-minutes", 0]
    checkpoint = tmp_path / "out" / "checkpoint.pt"

    def kill(_):
        if checkpoint.exists():
            raise KeyboardInterrupt
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sd_gym.tasks.preparation.MeanQuality.by_share", kill)
        runner.invoke(app, [str(part) for part in prepare])
    checkpoint.write_bytes(b"garbage")
    assert "checkpoint.pt is damaged" in call(*prepare, "--resume")


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b'{"env": 1}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_of_a_run(content, tmp_path, reviews, tiny_backbone):
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    train(CUSTOM, "dense", tmp_path / "run", steps=1, **settings)
    whole = (tmp_path / "run" / "policy.safetensors").read_bytes()
    (tmp_path / "run" / "policy.safetensors").write_bytes(whole[:-10])
    assert "policy.safetensors is damaged" in call("evaluate", "run")
    (tmp_path / "run" / "config.json").write_bytes(content)
    assert "config.json " in call("evaluate", "run")
