"""What long commands say: plain lines where there is no terminal, and that the machine is busy."""

import io
import os
import time
from inspect import signature

import numpy as np
import pytest
from rich.console import Console
from sd_gym.agents.experiment.reduction import reduce
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.tabulation import tabulate
from sd_gym.agents.experiment.tune import tune
from typer.main import get_command
from typer.testing import CliRunner

from sd_gym import evaluate
from sd_gym.cli import app, terminal


@pytest.fixture
def log(monkeypatch):
    """What is written where there is no terminal, with a line every 20 ms."""
    monkeypatch.setattr(terminal, "FIRST_LINE", 0.02)
    monkeypatch.setattr(terminal, "EVERY_LINE", 0.02)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    text = io.StringIO()
    monkeypatch.setattr(terminal, "errors", Console(file=text, markup=False, emoji=False))
    return text


def test_a_log_has_a_line_now_and_then(log):
    with terminal.progress_bar() as progress:
        bar = progress.add_task("learning", total=4000, figures="")
        for step in range(1, 6):
            progress.update(bar, completed=step, figures="quality 0.981")
            time.sleep(0.03)
    lines = log.getvalue().splitlines()
    assert 2 <= len(lines) <= 8
    assert lines[-1].startswith("learning ")
    assert " of 4000, quality 0.981, " in lines[-1]
    assert lines[-1].endswith(" left")


def test_a_narrow_terminal_shows_steps_and_time_and_cuts_figures(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(terminal, "errors", Console(file=text, width=80, force_terminal=True, markup=False))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    with terminal.progress_bar() as progress:
        bar = progress.add_task(
            "learning", total=100_000, figures="quality 0.805  quality_ref 0.930  flops_ratio 0.528"
        )
        progress.update(bar, completed=28_160)
    assert "28160/100000" in text.getvalue()
    assert "quality 0.8" in text.getvalue()


def test_a_narrow_terminal_cuts_no_figure_of_a_result(monkeypatch):
    text, env = io.StringIO(), "SD/Classification-TREC-Table-v1"
    monkeypatch.setattr(terminal, "console", Console(file=text, width=30, markup=False))
    result = evaluate(env, lambda seen: np.zeros((len(seen), 13), dtype=np.int64), policy_flops=0)
    level = {"difficulty": 1, "instances": 1, "quality": 0.5, "flops_ratio": 0.3, "flops_ratio_with_policy": 0.412}
    result |= {"goes_on": 0.256, "by_difficulty": [level, level], "return": -0.1234}
    terminal.print_result("TREC", result)
    shown = " ".join(text.getvalue().split())
    assert "…" not in shown
    assert {"100.0%", "41.2%", "-0.123"} <= {*shown.split()}
    assert "25.6% of the answers went on" in shown


def test_what_a_terminal_cannot_print_is_escaped(tmp_path):
    env = tmp_path / "rü.yaml"
    env.write_text("id: My/rü-v0\nextends: table.yaml\n", encoding="utf-8")
    done = CliRunner(charset="ascii").invoke(app, ["envs", "--import", str(env)])
    assert done.exit_code == 0, done.output
    assert "My/r\\xfc-v0" in done.output
    done = CliRunner(charset="ascii").invoke(app, ["envs", "My/rü"])
    assert "My/r\\xfc" in done.stderr


def test_what_a_pair_gives_is_not_read_as_yaml():
    columns = ["text=Review #", "label=007", "text_pair=[x]: y=z"]
    assert dict(terminal.pairs_of(columns, "--column")) == {"text": "Review #", "label": "007", "text_pair": "[x]: y=z"}
    with pytest.raises(ValueError, match="--column: expected key=value, got 'text'"):
        list(terminal.pairs_of(["text"], "--column"))


def test_a_log_says_that_a_command_without_steps_goes_on(log):
    with terminal.status("reducing"):
        time.sleep(0.05)
    assert log.getvalue().splitlines()[0] == "reducing, 0:00:00 so far"


def test_a_hidden_bar_writes_nothing(log):
    with terminal.progress_bar(visible=False) as progress:
        progress.add_task("learning", total=4, figures="")
        time.sleep(0.05)
    assert not log.getvalue()


@pytest.mark.parametrize(("load", "threads", "said"), [(1.5, None, True), (1.5, "1", False), (0.5, None, False)])
def test_a_busy_machine_is_said_to_be_busy_once(log, monkeypatch, load, threads, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with terminal.progress_bar():
        pass
    assert log.getvalue().count("OMP_NUM_THREADS=1") == said


def test_an_option_of_keys_and_values_names_itself():
    for pairs in (["foo"], ["=1"], ["a=[1"], ["a=1", "b=1", "a=2"]):
        with pytest.raises(ValueError, match="--set"):
            terminal.settings_of(pairs)
    for pairs in (["foo"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="--column"):
            list(terminal.pairs_of(pairs, "--column"))


@pytest.mark.parametrize("function", [train, tune, tabulate, reduce])
def test_the_advice_names_only_options_that_the_command_has(function):
    options = [option for one in get_command(app).commands[function.__name__].params for option in one.opts]
    for key in signature(function).parameters:
        with pytest.raises(ValueError, match=f"{key} is not a setting; ") as told:
            terminal.settings_of([f"{key}=1"], call=function)
        advice = str(told.value).rpartition("; ")[2]
        assert advice == "leave it out" or advice.removeprefix("use the option ") in options
