"""Output folders: nothing foreign is overwritten, nobody else writes meanwhile, and only what is the same goes on."""

import json
import os
import signal
import subprocess
import sys

import pytest
from sd_gym.agents.experiment.run import train
from typer.testing import CliRunner

import sd_gym
from sd_gym.backbones import Recipe
from sd_gym.cli import app
from sd_gym.config import BackboneConfig, DataConfig
from sd_gym.folders import FolderInUseError, check_empty, contents, locked
from sd_gym.tasks.preparation import prepare_backbone
from tests.conftest import CutError

CUSTOM = "SD/Classification-Custom-v0"
HOLD = """
import sys, time
from pathlib import Path
from sd_gym.folders import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def commands(settings, reviews, tiny_backbone):
    """What writes to a folder, by name."""
    return {
        "train": lambda folder: train(CUSTOM, "hash", folder, steps=1, **settings),
        "resume": lambda folder: train(CUSTOM, "hash", folder, steps=1, **settings, resume=True),
        "evaluate": lambda folder: sd_gym.evaluate(CUSTOM, dense, "test", folder, **settings),
        "prepare": lambda folder: prepared(tiny_backbone, reviews, folder),
    }


def dense(observations):
    return [[0] * 7] * len(observations)


def prepared(backbone, dataset, folder, *, changes=None, **options):
    parts = BackboneConfig(name=str(backbone)), DataConfig(dataset=str(dataset))
    recipe = Recipe(**{"steps": 20, "learning_rate": 0.003, **(changes or {})})
    return prepare_backbone(*parts, "classification", folder, recipe, **options)


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize("name", ["train", "resume", "evaluate", "prepare"])
@pytest.mark.parametrize("file", ["config.json", "notes.txt", "result.json", "checkpoint.pt"])
def test_foreign_files_are_never_overwritten(name, file, commands, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / file).write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match=r"holds a (model|result);|is not empty and not a .* it holds "):
        commands[name](folder)
    assert files_of(folder) == {file: b'{"model_type": "bert"}'}


@pytest.mark.parametrize("name", ["train", "evaluate", "prepare"])
def test_another_process_fails_at_once_and_a_killed_one_leaves_no_lock(name, commands, tmp_path):
    folder = tmp_path / "shared"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"another process is writing to {folder}; wait for it, or choose"):
            commands[name](folder)
        assert contents(folder) == []
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    commands[name](folder)


def test_the_command_line_says_it_in_one_line(settings, tmp_path):
    arguments = ["train", CUSTOM, "--algo", "hash", "--output", str(tmp_path / "run")]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    with locked(tmp_path / "run"):
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "another process is writing to" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path):
    with pytest.raises(CutError), locked(tmp_path / "a" / "b"):
        raise CutError
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(CutError), locked(tmp_path / "there"):
        raise CutError
    assert list((tmp_path / "there").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"), locked(tmp_path / "file"):
        pass
    with pytest.raises(FileExistsError, match="is a file"):
        check_empty(tmp_path / "file")


@pytest.fixture
def cut_preparation(reviews, tiny_backbone, tmp_path):
    def cut(step, figures):
        if step == 15:
            raise CutError

    with pytest.raises(CutError):
        prepared(tiny_backbone, reviews, tmp_path / "out", on_step=cut)
    return tmp_path / "out"


def test_a_preparation_that_was_cut_off_is_not_overwritten(cut_preparation, reviews, tiny_backbone):
    before = files_of(cut_preparation)
    with pytest.raises(FileExistsError, match="interrupted preparation; continue it with --resume"):
        prepared(tiny_backbone, reviews, cut_preparation)
    assert files_of(cut_preparation) == before
    prepared(tiny_backbone, reviews, cut_preparation, resume=True)
    assert {"model.safetensors", "preparation.json"} <= files_of(cut_preparation).keys()
    assert not {"preparing.json", "checkpoint.pt"} & files_of(cut_preparation).keys()
    with pytest.raises(FileExistsError, match="holds a model"):
        prepared(tiny_backbone, reviews, cut_preparation, resume=True)


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 1), ("steps", 30), ("learning_rate", 0.1), ("max_rate", 0.3), ("batch_size", 8)]
)
def test_a_preparation_goes_on_only_as_it_began(key, value, cut_preparation, reviews, tiny_backbone):
    with pytest.raises(ValueError, match=rf"holds another preparation: its {key} is [^,]*, now it is {value}$"):
        prepared(tiny_backbone, reviews, cut_preparation, resume=True, changes={key: value})


def test_a_preparation_goes_on_only_with_its_data(cut_preparation, reviews, tiny_backbone):
    lines = reviews.read_text().splitlines()
    reviews.write_text("\n".join([*lines[:8], json.dumps({"text": "awful awful", "label": 0}), *lines[9:]]) + "\n")
    with pytest.raises(ValueError, match="the data have changed: validation was 4 instances"):
        prepared(tiny_backbone, reviews, cut_preparation, resume=True)


def test_one_lock_at_a_time(tmp_path):
    """Held by this very process, too."""
    with locked(tmp_path / "run"), pytest.raises(FolderInUseError), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass
