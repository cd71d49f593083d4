"""Tuning: settings are searched quality first, and the best are written down."""

import errno
import re
import sys

import pytest
import yaml
from sd_gym.agents.a2c.agent import A2CAgent, A2CSettings
from sd_gym.agents.experiment.comparison_plan import PlannedRun
from sd_gym.agents.experiment.tune import BEST, STUDY, _study, score, tune
from sd_gym.agents.ppo.agent import PPOAgent
from sd_gym.agents.registry import AGENTS
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from tests.agents.experiment.conftest import Killed

CUSTOM, TREC = "SD/Classification-Custom-v0", "SD/Classification-TREC-Table-v1"
DEFAULT = A2CSettings().learning_rate


def test_quality_comes_before_flops_and_fewer_flops_are_better():
    outcomes = [(True, 0.0, 0.2), (True, -0.004, 0.9), (True, 0.0, 1.01), (False, -0.001, 0.1), (False, -0.1, 0.05)]
    keys = ("quality_kept", "quality_difference", "flops_ratio_with_policy")
    scores = [score(dict(zip(keys, outcome, strict=True))) for outcome in outcomes]
    assert scores == sorted(scores)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize("algo", AGENTS.built_in())
def test_defaults_lie_within_what_is_searched(algo):
    settings = AGENTS.find(algo).Settings
    for key, values in settings.space.items():
        default = getattr(settings(), key)
        assert values[0] <= default <= values[1] if isinstance(values, tuple) else default in values
        ends = values if isinstance(values, tuple) else values[:: len(values) - 1]
        assert all(settings(**{key: value}) for value in ends)


def test_a_search_that_was_killed_goes_on_and_its_best_settings_can_be_set(reviews, tiny_backbone, tmp_path):
    pytest.importorskip("optuna")
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone), "epsilon": 1.0, "num_envs": 16}
    arguments = {"steps": 64, "trials": 2, "confidence": 0.5, **settings}
    tried = []

    def kill(one):
        tried.append(one)
        raise Killed

    with pytest.raises(Killed):
        tune(CUSTOM, "a2c", tmp_path / "study", on_trial=kill, **arguments)
    assert "num_envs" not in tried[0].settings  # it is set
    assert tried[0].settings["learning_rate"] == DEFAULT  # the default comes first
    file = tune(CUSTOM, "a2c", tmp_path / "study", on_trial=tried.append, **arguments)
    assert [one.number for one in tried] == [0, 1]
    best = min(tried, key=lambda one: one.score)
    found = yaml.safe_load(file.read_text())
    result = sd_gym.train(CUSTOM, "a2c", tmp_path / "run", **{**settings, "steps": 64, **found})
    assert found.pop("confidence") == 0.75  # both trials have seen the rows of the guarantee
    assert found.items() <= best.settings.items()
    assert result["flops_ratio"] > 0
    assert tune(CUSTOM, "a2c", tmp_path / "study", **arguments) == tmp_path / "study" / BEST  # all is done
    with pytest.raises(ValueError, match="holds another study"):
        tune(CUSTOM, "a2c", tmp_path / "study", **{**arguments, "steps": 65})
    with pytest.raises(FileExistsError, match="not a folder of a study"):
        tune(CUSTOM, "a2c", reviews.parent, **arguments)


def test_trials_are_scored_with_the_confidence_that_they_are_selected_with(tmp_path):
    pytest.importorskip("optuna")
    tried, arguments = [], {"steps": 600, "trials": 1, "confidence": 0.5}
    tune(TREC, "a2c", tmp_path / "study", on_trial=tried.append, **arguments)
    assert tried[0].score < 1  # with 95% it would not be kept


@pytest.mark.parametrize(("algo", "agent"), [("ppo", PPOAgent), ("a2c", A2CAgent)])
def test_with_a_start_the_defaults_are_those_of_refining(algo, agent, tmp_path):
    """``best.yaml`` leaves out what ``sd_gym.train`` does by itself."""
    pytest.importorskip("optuna")
    start, tried = tmp_path / "start", []
    sd_gym.train(TREC, "imitation", start, steps=64, epochs=1)
    arguments = {"steps": 64, "trials": 1, "start": str(start)}
    file = tune(f"sd_gym:{TREC}", algo, tmp_path / "study", on_trial=tried.append, **arguments)
    assert tried[0].settings["learning_rate"] == agent.refining_rate
    low, high = agent.Settings.space["learning_rate"]
    assert low <= agent.refining_rate <= high
    assert yaml.safe_load(file.read_text()) == {}


@pytest.mark.parametrize("cut_off", ["asked for", "trained"])
def test_a_trial_that_was_cut_off_goes_on_in_its_folder(cut_off, reviews, tiny_backbone, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    from sd_gym.agents.experiment import tune as tuning

    def killed(*arguments, **more):
        raise Killed

    place = (optuna.storages._CachedStorage, "set_trial_param") if cut_off == "asked for" else (tuning, "train_many")
    monkeypatch.setattr(*place, killed)
    with pytest.raises(Killed):
        tune(CUSTOM, "a2c", tmp_path / "study", steps=32, trials=1, **settings)
    monkeypatch.undo()
    tried = []
    tune(CUSTOM, "a2c", tmp_path / "study", steps=32, trials=1, on_trial=tried.append, **settings)
    assert [one.settings["learning_rate"] for one in tried] == [DEFAULT]
    assert sorted(file.name for file in (tmp_path / "study").glob("trial-*")) == ["trial-0"]


def test_trials_that_failed_are_tried_again_in_their_folders(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    train, folder = PlannedRun.train, tmp_path / "study"
    command = ["tune", TREC, "--algo", "a2c", "--steps", "64", "--trials", "2", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", ["sd-gym", "--import", "a\nb: {"])
    for works, code, says in [
        ((), 2, r"all trials of .* failed"),
        ((0,), 1, "failed trials: 1; again: this command"),
        ((0, 1), 0, ""),
        ((), 0, ""),  # all is done
    ]:

        def fails(run, *arguments, works=works):
            if run.folder.parent.name not in [f"trial-{number}" for number in works]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return train(run, *arguments)

        monkeypatch.setattr(PlannedRun, "train", fails)
        done = CliRunner().invoke(app, command)
        assert done.exit_code == code, done.output
        assert re.search(says, done.stderr)
    assert sorted(file.name for file in folder.glob("trial-*")) == ["trial-0", "trial-1"]
    best = yaml.safe_load((folder / BEST).read_text())
    assert best.pop("confidence") == 0.975
    assert best.keys() <= A2CSettings.space.keys()
    assert "2 trials of 64 decisions" in (folder / BEST).read_text()


def test_a_study_is_in_its_folder_whatever_the_name(tmp_path):
    pytest.importorskip("optuna")
    folder = tmp_path / "a%20b @h:80 #{x} ü?x=1"
    folder.mkdir()
    _study(folder, {})
    assert (folder / STUDY).stat().st_size


def test_a_damaged_study_is_named(tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / STUDY).write_bytes(b"garbage" * 100)
    with pytest.raises(ValueError, match=rf"{tmp_path / STUDY} cannot be read or written \(file is not a database\)"):
        tune(TREC, "a2c", tmp_path, trials=1)


def test_what_has_nothing_to_search_says_so(tmp_path):
    pytest.importorskip("optuna")
    result = CliRunner().invoke(
        app, ["tune", "SD/Classification-Mini-v0", "--algo", "dense", "--output", str(tmp_path)]
    )
    assert result.exit_code == 2
    assert "dense has nothing to search" in result.stderr


def test_the_command_of_the_best_has_the_confidence_for_one_trial(tmp_path):
    pytest.importorskip("optuna")
    options = ["--trials", "2", "--steps", "64", "--confidence", "0.9", "--output", str(tmp_path / "study")]
    result = CliRunner().invoke(app, ["tune", TREC, "--algo", "ppo", *options])
    assert result.exit_code == 0, result.output
    command = result.output[result.output.index("sd-gym train") :]
    assert "--confidence" not in command  # 0.95 for one is 0.9 for both, and the default
