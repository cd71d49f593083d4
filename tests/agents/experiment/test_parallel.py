"""``compare ENV...``: every agent and control on every env, each run kept, gone on with, or reported."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from sd_gym.agents import register_agent
from sd_gym.agents.baselines.constant import HashAgent
from sd_gym.agents.experiment.comparison_plan import plan_comparison
from sd_gym.agents.experiment.parallel import train_many
from sd_gym.agents.learning.agent import NotApplicableError
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.registration import import_own
from tests.agents.experiment.conftest import Killed

CUSTOM = "SD/Classification-Custom-v0"
FLAKY = """
import os
import re
import signal
from pathlib import Path

import torch

from sd_gym.agents import register_agent
from sd_gym.agents.baselines.constant import HashAgent


def first_time(name):
    mark = Path(__file__).with_name(name)
    there = mark.exists()
    mark.touch()
    return not there


class Fails(HashAgent):
    def learn(self, *arguments):
        if first_time("failed"):
            raise RuntimeError(f"the cat sat on it; threads: {torch.get_num_threads()}")


class Dies(HashAgent):
    def learn(self, *arguments):
        if first_time("died"):
            os.kill(os.getpid(), signal.SIGKILL)


register_agent("fails", Fails)
register_agent("dies", Dies)
"""


class Elsewhere(HashAgent):
    def __init__(self, *args, **kwargs):
        raise NotApplicableError("it needs an env with a view")


@pytest.fixture
def flaky(tmp_path, own_names):
    """A file that registers ``fails`` and ``dies``, each of which does so the first time."""
    file = tmp_path / f"flaky_{abs(hash(tmp_path))}.py"
    file.write_text(FLAKY)
    return import_own(str(file))


@pytest.fixture
def one_thread():
    """Here as in each of two processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def states(words):
    return {word.run.folder.name: word.state for word in words}


def written(folder):
    """What a run left but for its times."""
    result = json.loads((folder / "result.json").read_text())
    del result["time"]
    files = [(folder / name).read_bytes() for name in ("policy.safetensors", "instances.csv")]
    return result, files


def test_what_fails_or_dies_stops_nothing_and_is_done_again_alone(settings, flaky, one_thread, tmp_path):
    shared = {"seeds": 1, "steps": 200, "controls": False, "settings": settings}
    runs = plan_comparison(
        [CUSTOM], ["fails", "dies", "a2c-from-fails", "a2c", "hash"], output=tmp_path / "two", **shared
    )
    torch.set_num_threads(4)
    words = train_many(runs, jobs=2, imports=[flaky])
    torch.set_num_threads(1)
    expected = {"fails-0": "failed", "dies-0": "failed", "a2c-from-fails-0": "failed"}
    assert states(words) == expected | {"a2c-0": "finished", "hash-0": "finished"}
    messages = {word.run.folder.name: word.message for word in words}
    assert messages["fails-0"] == "RuntimeError: the cat sat on it; threads: 1"
    assert "exit code -9" in messages["dies-0"]
    assert messages["a2c-from-fails-0"].endswith("fails-0, which it starts from, failed")

    before = written(tmp_path / "two/Classification-Custom/a2c-0")
    states_now = states(train_many(runs, imports=[flaky]))
    assert states_now == dict.fromkeys(expected, "finished") | {"a2c-0": "kept", "hash-0": "kept"}
    assert written(tmp_path / "two/Classification-Custom/a2c-0") == before

    one = plan_comparison([CUSTOM], ["hash", "a2c"], output=tmp_path / "one", **shared)
    train_many(one)
    for name in ("a2c-0", "hash-0"):
        assert written(tmp_path / "one/Classification-Custom" / name) == written(
            tmp_path / "two/Classification-Custom" / name
        )


def test_a_comparison_that_was_killed_goes_on_and_ends_as_the_uninterrupted_one(settings, tmp_path):
    arguments = {"controls": False, "seeds": 2, "steps": 400, **settings}
    whole = sd_gym.train_all([CUSTOM], ["a2c"], tmp_path / "whole", **arguments)

    def kill(word):
        if word.run.seed == 1 and word.steps >= 200:
            raise Killed

    with pytest.raises(Killed):
        sd_gym.train_all([CUSTOM], ["a2c"], tmp_path / "cut", on_status=kill, **arguments)
    assert (tmp_path / "cut/Classification-Custom/a2c-1/checkpoint.pt").exists()
    begun = []
    words = sd_gym.train_all([CUSTOM], ["a2c"], tmp_path / "cut", on_status=begun.append, **arguments)
    assert states(words) == {"a2c-0": "kept", "a2c-1": "finished"}
    assert min(word.steps for word in begun if word.state == "learning") > 150  # it went on
    for cut, one in zip(words, whole, strict=True):
        assert written(cut.run.folder) == written(one.run.folder)
    alone = sd_gym.train(CUSTOM, "a2c", tmp_path / "alone", steps=400, seed=1, **settings)
    assert alone["flops_ratio"] == written(whole[1].run.folder)[0]["flops_ratio"]
    (row,) = sd_gym.compare([word.run.folder for word in words])
    assert row["seeds"] == 2


def test_another_run_is_not_taken_for_the_one_that_is_asked_for(settings, tmp_path):
    arguments = {"controls": False, "seeds": 1, **settings}
    sd_gym.train_all([CUSTOM], ["hash"], tmp_path, steps=1, **arguments)
    for changed, message in [({"steps": 2}, "its steps is 1, now it is 2"), ({"rate": 0.5}, "its rate is 0.2, now")]:
        (word,) = sd_gym.train_all([CUSTOM], ["hash"], tmp_path, **{"steps": 1, **arguments, **changed})
        assert word.state == "failed"
        assert message in word.message
    (word,) = sd_gym.train_all([CUSTOM], ["hash"], tmp_path, steps=1, **arguments)
    assert word.state == "kept"


def test_on_a_table_early_exit_is_passed_over_and_all_else_compared(full_table, tmp_path):
    arguments = {"seeds": 1, "steps": 64, "table": full_table}
    words = sd_gym.train_all(["SD/Table-v0"], ["ppo"], tmp_path, **arguments)
    expected = dict.fromkeys(["ppo-0", "hull-0", "random-0", "hash-0", "dense-0", "blind-ppo-0"], "finished")
    assert states(words) == expected | {"early-exit-0": "not applicable"}
    again = sd_gym.train_all(["SD/Table-v0"], ["ppo"], tmp_path, **arguments)
    assert states(again) == dict.fromkeys(expected, "kept") | {"early-exit-0": "not applicable"}
    there = [word.run.folder for word in again if word.state == "kept"]
    assert {row["agent"] for row in sd_gym.compare(there)} == {name[:-2] for name in expected}


def test_on_the_command_line(settings, own_names, tmp_path):
    register_agent("elsewhere", Elsewhere)
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    options = ["--seeds", "2", "--steps", "100", "--output", str(tmp_path), *pairs]
    page = tmp_path / "report.html"
    arguments = ["compare", CUSTOM, "--algos", "a2c,elsewhere", "--no-controls", *options]
    result = CliRunner().invoke(app, [*arguments, "--markdown", "--report", str(page)])
    assert result.exit_code == 0, result.output
    assert re.search(rf"\| {CUSTOM} \| a2c \|.* of 2 \|\n", result.output)
    assert "Classification-Custom/elsewhere-0: not applicable (it needs an env with a view)" in result.stderr
    assert "a2c" in page.read_text()

    (tmp_path / "Classification-Custom/a2c-1/result.json").unlink()
    (tmp_path / "Classification-Custom/a2c-1/config.json").write_text("{")
    result = CliRunner().invoke(app, [*arguments, "--markdown"])
    assert result.exit_code == 1
    assert re.search(rf"\| {CUSTOM} \| a2c \|.* of 1 \|\n", result.output)
    assert f"failed: {tmp_path}/Classification-Custom/a2c-1: FileExistsError" in result.stderr
    assert "--algo a2c --output" in result.stderr
    result = CliRunner().invoke(app, ["compare", CUSTOM, "nowhere"])
    assert result.exit_code == 2
    assert "unknown env 'nowhere'" in " ".join(result.stderr.split())


def test_a_run_on_data_that_have_changed_is_not_kept(settings, tmp_path):
    own = Path(shutil.copy(settings["dataset"], tmp_path / "own.jsonl"))
    arguments = [CUSTOM], ["dense"], tmp_path / "out"
    options = {**settings, "dataset": str(own), "controls": False, "seeds": 1}
    assert [status.state for status in sd_gym.train_all(*arguments, **options)] == ["finished"]
    assert [status.state for status in sd_gym.train_all(*arguments, **options)] == ["kept"]
    own.write_text("\n".join(own.read_text().splitlines()[::-1]))
    (status,) = sd_gym.train_all(*arguments, **options)
    assert (status.state, "the data have changed" in status.message) == ("failed", True)


def test_another_run_to_start_from_is_not_the_same_start(settings, tmp_path):
    for name, steps in (("a", 8), ("b", 16)):
        sd_gym.train(CUSTOM, "a2c", tmp_path / name / "start", steps=steps, num_envs=4, **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    states = []
    for name in ("a", "moved", "b"):
        options = {**settings, "controls": False, "seeds": 1, "steps": 8, "num_envs": 4}
        (status,) = sd_gym.train_all([CUSTOM], ["a2c"], tmp_path / "out", start=tmp_path / name / "start", **options)
        states.append(status.state)
    assert states == ["finished", "kept", "failed"]
