"""A user's own names: registered, imported on the command line; unknown ones get a helpful error."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from sd_gym.agents import agent_names
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.registration import import_own
from sd_gym.registry import Registry, UnknownNameError
from tests.conftest import write_env

pytestmark = pytest.mark.usefixtures("own_names")
THINGS = """
import numpy as np
from torch import nn

import beside
import sd_gym
from sd_gym.agents.ppo.agent import PPOAgent

sd_gym.register_objective("stingy", lambda quality, quality_ref, flops_ratio, **rest: quality - flops_ratio)
sd_gym.register_network("linear", nn.Linear)
sd_gym.register_agent("my-ppo", type("MyPPO", (PPOAgent,), {}))
sd_gym.register_env(beside.FILE)
"""


@pytest.mark.parametrize(
    ("register", "thing"),
    [
        (sd_gym.register_network, 5),
        (sd_gym.register_network, torch.nn.Linear(2, 2)),
        (sd_gym.register_ranking, 5),
        (lambda name, thing: sd_gym.register_metric(name, of_text=thing), 5),
    ],
)
def test_what_is_no_function_is_refused_at_once(register, thing):
    with pytest.raises(TypeError, match=r"'mine' must be (a function|made anew for each agent)"):
        register("mine", thing)


def test_a_registry_knows_what_is_registered_and_guards_what_is_built_in():
    registry = Registry("thing", {"lazy": "json:dumps", "given": 3})
    assert registry.find("lazy") is json.dumps
    assert registry.find("given") == 3
    registry.register("mine", 1)
    registry.register("mine", 2)
    assert registry.find("mine") == 2
    assert registry.names() == ["lazy", "given", "mine"]
    for name in ("given", "", 5, ["given"]):
        with pytest.raises(ValueError, match="needs a name of its own"):
            registry.register(name, 1)
    with pytest.raises(
        UnknownNameError, match=r"unknown thing 'mines'; did you mean 'mine'\? Known things: lazy, given"
    ):
        registry.find("mines")
    with pytest.raises(UnknownNameError, match="did you mean 'given'"):  # it starts so
        registry.find("g")
    with pytest.raises(UnknownNameError, match=r"unknown thing 'json:loads'.*--import MODULE_OR_FILE"):
        registry.find("json:loads")  # nothing is looked up in modules


@pytest.fixture
def things(reviews, tiny_backbone, tmp_path):
    """A user's module that imports the one beside it."""
    file = write_env(tmp_path, reviews, tiny_backbone)
    (tmp_path / "beside.py").write_text(f"FILE = {str(file)!r}\n")
    (tmp_path / "my_things.py").write_text(THINGS)
    return tmp_path / "my_things.py"


def test_a_file_or_a_module_is_imported_once(things, monkeypatch):
    monkeypatch.chdir(things.parent)
    assert import_own("my_things.py") == str(things)
    module = sys.modules["my_things"]
    assert import_own("./my_things.py") == str(things)
    assert import_own("my_things") == "my_things"
    assert sys.modules["my_things"] is module
    assert "my-ppo" in agent_names()


def test_imports_that_fail(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file 'none.py' to import"):
        import_own("none.py")
    with pytest.raises(FileNotFoundError, match="no module 'no_such_module' to import"):
        import_own("no_such_module")
    (tmp_path / "random.py").write_text("")
    with pytest.raises(ValueError, match="there is another module 'random'; rename the file"):
        import_own("random.py")
    (tmp_path / "needs_more.py").write_text("import no_such_module\n")
    for name in ("needs_more.py", "needs_more"):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):  # the module's own error, as it is
            import_own(name)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result, " ".join((result.output + result.stderr).split())


def test_the_command_line_imports_a_users_modules(things, tmp_path):
    folder = tmp_path / "run"
    chosen = ["--set", "network=linear", "--set", "objective=stingy", "--set", "num_envs=64"]
    arguments = ["train", "Own/Reviews-v0", "--algo", "my-ppo", "--steps", 64, "--output", folder, *chosen]
    for missing in ("agent 'my-ppo'", "env 'Own/Reviews-v0'"):
        result, output = run(*arguments)
        assert result.exit_code == 2
        assert f"unknown {missing}" in output
        assert "first import the module that registers it (on the command line: --import" in output
        arguments[3] = "ppo"
    arguments[3] = "my-ppo"
    result, output = run(*arguments, "--import", things)
    assert result.exit_code == 0, output
    description = json.loads((folder / "config.json").read_text())
    assert description["imports"] == [str(things)]
    assert description["env_config"]["reward"]["objective"] == "stingy"
    assert "Own/Reviews-v0" in run("envs", "--import", things)[1]

    environment = {**os.environ, "COLUMNS": "400"}
    command = [sys.executable, "-m", "sd_gym.cli", "evaluate", str(folder)]
    clean = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert clean.returncode == 2
    assert "unknown network 'linear'" in clean.stderr
    assert f"{folder} was made with --import {things}; pass that again" in " ".join(clean.stderr.split())
    assert "Traceback" not in clean.stderr
    result, output = run("evaluate", folder, "--import", things, "--output", tmp_path / "again")
    assert result.exit_code == 0, output
    assert (tmp_path / "again" / "result.png").exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    result, output = run("compare", folder, tmp_path / "again", empty, things, "--markdown", "--import", things)
    assert result.exit_code == 0, output
    assert re.search(r"\| Own/Reviews-v0 \| my-ppo \| 4, hash .* [01] of 1 \|", output)  # evaluated twice, trained once
    assert "counted once" in output
    assert f"ignored, as they hold no result.json of a test split: {empty}, {things}" in output
    options = ["--env", "Own/Reviews-v0", "--steps", 2, "--output", tmp_path / "prepared", "--import", things]
    backbone = description["env_config"]["backbone"]["name"]
    result, output = run(
        "prepare", "--backbone", backbone, "--dataset", description["env_config"]["data"]["dataset"], *options
    )
    assert result.exit_code == 0, output


@pytest.mark.parametrize("command", ["train ID", "evaluate x", "compare x", "prepare --output x", "envs"])
def test_a_missing_import_ends_every_command_with_words(command):
    result, output = run(*command.split(), "--import", "no_such_module")
    assert result.exit_code == 2
    assert "no module 'no_such_module' to import; expected one that can be imported from here" in output
    assert "Traceback" not in output
