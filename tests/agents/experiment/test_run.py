"""Runs: what their folders hold, how they go on, and how they are reduced."""

import json
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sd_gym.agents.drawing.run_picture import plot_run
from sd_gym.agents.experiment import run as run_module
from sd_gym.agents.experiment.evaluation import evaluate
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.runs.folder import read_description
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.config import ConfigError
from sd_gym.execution.scoring import Scoring
from sd_gym.going_on import masks_and_goes_on
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from tests.agents.conftest import LEARNING, SB3, STAGED, STAGES, asked, bold, cut_off, staged_settings, walked

CUSTOM, TREC = "SD/Classification-Custom-v0", "SD/Classification-TREC-Table-v1"
TAGS = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "rollout/quality",
    "rollout/quality_ref",
    "rollout/flops_ratio",
    "rollout/success_rate",
    "time/fps",
    "validation/quality",
    "validation/flops_ratio",
    "validation/reward",
}


@pytest.mark.parametrize("name", [*LEARNING, "random", "blind-reinforce"])
def test_a_run_folder_is_complete(name, finished, custom):
    folder, result, told = finished(name)
    files = {file.name for file in folder.iterdir()}
    wanted = {"config.json", "policy.json", "policy.safetensors", "result.json", "result.png"}
    assert wanted <= files
    assert ("sb3.safetensors" in files) == (name in SB3)
    assert not any(file.endswith((".tmp", ".pt")) for file in files)
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    config = json.loads((folder / "config.json").read_text())
    assert config["env_config"]["reward"]["penalty"] == 3.0
    assert config["algo"] == name
    assert "torch" in config["versions"]
    if name != "random":
        assert told[-1][0] >= 640
        events = EventAccumulator(str(folder)).Reload()
        assert set(events.Tags()["scalars"]) >= TAGS
    _, core, policy = load_run(folder)
    again = evaluate(core, policy, "test")
    assert again == {key: result[key] for key in again}
    with pytest.raises(FileExistsError, match="finished run"):
        train(CUSTOM, name, folder, steps=10, **custom)


def test_a_run_is_drawn_with_its_validations_and_without(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "plot_run", plot_run)  # as large as it is
    for name in ("ppo", "dense"):
        train(CUSTOM, name, tmp_path / name, steps=64, **settings)
        height, width, _ = imread(tmp_path / name / "result.png").shape
        assert width > height > 500


def test_a_policy_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no policy.json"):
        DecisionPolicy.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_run(tmp_path)
    with pytest.raises(ConfigError):
        train(CUSTOM, "ppo", tmp_path / "run", steps=10)


@pytest.mark.parametrize("name", [*LEARNING, "blind-ppo"])
def test_a_run_that_was_killed_ends_as_the_uninterrupted_one(name, finished, custom, tmp_path):
    whole_folder, whole, _ = finished(name)
    arguments, cut = asked(custom), tmp_path / "cut"
    cut_off(CUSTOM, name, cut, **arguments, after=420)
    with pytest.raises(FileExistsError, match="continue with --resume"):
        train(CUSTOM, name, cut, **arguments)
    with pytest.raises(ValueError, match="its seed is 3, now it is 4"):
        train(CUSTOM, name, cut, **{**arguments, "seed": 4}, resume=True)
    steps = []
    resumed = train(CUSTOM, name, cut, **arguments, resume=True, on_progress=lambda step, figures: steps.append(step))
    assert steps[0] > 320  # the decisions before the checkpoint were not made again
    weights = [(folder / "policy.safetensors").read_bytes() for folder in (whole_folder, cut)]
    assert weights[0] == weights[1]
    assert {**whole, "time": None} == {**resumed, "time": None}


def cut_run(settings, folder):
    arguments = {"steps": 1_000, **{**settings, "num_envs": 16}}
    cut_off(CUSTOM, "ppo", folder, **arguments, after=700)
    return arguments


def test_a_limit_that_falls_over_the_run_goes_on_where_it_was(tmp_path):
    """That of ``ppo_lex``; here the mean loss is between the limit after the cut and that of a new run."""
    arguments = {"steps": 8192, "num_envs": 256, "epsilon": 0.1}
    train(TREC, "ppo_lex", tmp_path / "whole", **arguments)
    cut_off(TREC, "ppo_lex", tmp_path / "cut", **arguments, after=2000)
    train(TREC, "ppo_lex", tmp_path / "cut", **arguments, resume=True)
    weights = [(tmp_path / folder / "policy.safetensors").read_bytes() for folder in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_where_nothing_can_be_lost_a_warning_says_so(settings, tmp_path, monkeypatch):
    """Such as the exact match of summaries: whatever is skipped, the quality is kept."""
    run = Scoring.run
    monkeypatch.setattr(Scoring, "run", lambda *of: 0 * run(*of))
    with pytest.warns(UserWarning, match=r"dense quality is 0\.0%, no more than epsilon, so nothing can be lost"):
        train(CUSTOM, "every-other", tmp_path / "run", steps=1, **{**settings, "epsilon": 0.01})
    with pytest.warns(UserWarning, match=r"no more than epsilon.* a smaller epsilon= \(0\.01 is one point\)"):
        train(TREC, "dense", tmp_path / "points", steps=1, epsilon=1)


def test_an_id_may_name_the_module_as_for_gymnasium(tmp_path):
    """And the run is that of the plain id."""
    train(f"sd_gym:{TREC}", "dense", tmp_path, steps=1)
    assert read_description(tmp_path)["env"] == TREC
    assert sd_gym.evaluate(f"sd_gym:{TREC}", tmp_path)["flops_ratio"] == 1


def test_a_run_that_was_cut_off_before_its_first_checkpoint_is_not_begun_again_unasked(settings, tmp_path):
    cut_run(settings, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    arguments = {"steps": 1_000, **{**settings, "num_envs": 16}}
    with pytest.raises(FileExistsError, match="interrupted run; continue with --resume"):
        train(CUSTOM, "ppo", tmp_path / "run", **arguments)
    train(CUSTOM, "ppo", tmp_path / "run", **arguments, resume=True)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_nothing_learns_on_the_rows_that_judge_it(split, settings, tmp_path):
    with pytest.raises(ValueError, match=f"learn on the training split; leave out split={split}"):
        train(CUSTOM, "ppo", tmp_path / "run", **settings, split=split)


def test_resume_names_what_differs(settings, tmp_path):
    arguments = cut_run(settings, tmp_path / "run")
    changed = {**arguments, "penalty": 3.0, "n_steps": 8}
    with pytest.raises(
        ValueError,
        match=r"another run; choose another --output: its reward\.penalty is 20\.0, now it is 3\.0, "
        r"its n_steps is 1, now it is 8$",
    ):
        train(CUSTOM, "ppo", tmp_path / "run", **changed, resume=True)
    with pytest.raises(
        ValueError, match=r"another run; choose another --output: its confidence is 0\.95, now it is 0\.9$"
    ):
        train(CUSTOM, "ppo", tmp_path / "run", **arguments, confidence=0.9, resume=True)


@pytest.fixture
def run(tmp_path, reviews, tiny_backbone):
    """A run with a policy that decides differently on each input."""
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone), "overlap": "allow", "epsilon": 1.0}
    folder = tmp_path / "run"
    sd_gym.train("SD/Classification-Custom-v0", "ppo", folder, steps=200, confidence=0.5, **settings)
    policy = DecisionPolicy.load(folder)
    with torch.no_grad():
        policy.head.weight.normal_(std=20)
        policy.head.bias.zero_()
    policy.save(folder)
    return folder


def test_the_reduced_run_stands_beside_the_one_it_was_made_of(run, tmp_path):
    done = CliRunner().invoke(app, ["reduce", str(run), "--codebook", "3", "--output", str(tmp_path / "few")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "few" / "result.json").read_text())
    assert result["decisions_used"] <= 3
    assert len(sd_gym.SkipPolicy.from_pretrained(tmp_path / "few").network.codebook) <= 3
    rows = sd_gym.compare([run, tmp_path / "few"])
    assert sorted(row["agent"] for row in rows) == ["ppo", "ppo (codebook 3)"]
    model = sd_gym.load(tmp_path / "few")
    assert len({tuple(one.skip) for one in model(["good food", "the room was bad", "awful", "fine fine room"])}) <= 3
    sd_gym.detach(model.model)
    again = CliRunner().invoke(app, ["reduce", str(run), "--output", str(tmp_path / "few")])
    assert again.exit_code == 2
    assert "holds a finished run" in again.output
    (tmp_path / "few" / "result.json").unlink()
    with pytest.raises(FileExistsError, match="was cut off; choose another --output, or delete it"):
        sd_gym.reduce(run, 2, tmp_path / "few")
    with pytest.raises(FileExistsError, match="was cut off"):  # it would overwrite what it reads
        sd_gym.reduce(tmp_path / "few", 3, tmp_path / "few")
    sd_gym.reduce(run, 3, tmp_path / "few")  # the same reduction, cut off, starts anew
    repeated = json.loads((tmp_path / "few" / "result.json").read_text())
    assert repeated | {"time": result["time"]} == result


def test_where_nothing_may_be_lost_no_number_of_instances_is_enough(tmp_path):
    options = ["--algo", "dense", "--output", str(tmp_path / "run"), "--set", "epsilon=0"]
    done = CliRunner().invoke(app, ["train", TREC, *options])
    assert done.exit_code == 0, done.output
    assert "a verdict needs an epsilon above 0." in done.output
    text = (tmp_path / "run" / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["fewest_instances"] is None


def test_without_steps_nothing_is_learned(tmp_path):
    with pytest.raises(ValueError, match="steps: expected a whole number from 1 to 4,294,967,295, got 0"):
        train(TREC, "ppo", tmp_path / "run", steps=0)
    assert not (tmp_path / "run").exists()


def test_what_decides_at_random_is_not_reduced(run, tmp_path):
    policy = DecisionPolicy.load(run)
    policy.noise = "hash"
    policy.save(run)
    with pytest.raises(ValueError, match="decides at random"):
        sd_gym.reduce(run, 4, tmp_path / "few")


def test_a_run_is_reduced_where_its_backbone_is_now(custom, tiny_backbone, tmp_path):
    shutil.copytree(tiny_backbone, tmp_path / "old")
    train(CUSTOM, "ppo", tmp_path / "run", steps=32, **{**custom, "backbone": str(tmp_path / "old")}, confidence=0.5)
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        sd_gym.reduce(tmp_path / "run", 2, tmp_path / "few")
    sd_gym.reduce(tmp_path / "run", 2, tmp_path / "few", backbone=str(tmp_path / "new"))
    assert SkipPolicy.from_pretrained(tmp_path / "few").card["backbone"]["name"] == str(tmp_path / "new")


@pytest.mark.parametrize("stages", [[*STAGES, "answer"], ["encoder.1"]])
def test_a_run_of_stages_is_reduced_and_its_artefact_decides_so(staged_env, stages, tmp_path):
    keys = {**staged_settings(staged_env), "stages": stages}
    train(STAGED, "ppo", tmp_path / "run", steps=32, **keys, confidence=0.5)
    bold(gym.make_vec(STAGED, num_envs=2, **keys).unwrapped, tmp_path / "run")
    sd_gym.reduce(tmp_path / "run", 2, tmp_path / "few")
    _, core, policy = load_run(tmp_path / "few")
    _, said, decisions = walked(core, policy)
    for stage, own in enumerate(core.stage_actions.components):
        assert len(np.unique(said[stage][:, own], axis=0)) <= 2
    assert len(np.unique(decisions, axis=0)) > 1
    model = sd_gym.load(tmp_path / "few")
    answers = model([one.source for one in core.split("train").instances])
    masks, went_on = masks_and_goes_on(decisions, len(core.mask_nvec))
    np.testing.assert_array_equal([one.skip for one in answers], masks[:, :-1])
    np.testing.assert_array_equal([one.went_on for one in answers], went_on)
    if core.has_answer_stage:
        assert policy.codebook[-2:, -1].tolist() == [0, 1]  # to accept and to go on are always left
    sd_gym.detach(model.model)


@pytest.mark.parametrize("seed", [np.int64(3), np.arange(4)[3]])
def test_numpys_integers_are_seeds_and_steps(seed, custom, tmp_path):
    results = [
        train(CUSTOM, "a2c", tmp_path / str(n), seed=given, steps=np.int32(8), num_envs=4, **custom)
        for n, given in enumerate((3, seed))
    ]
    assert results[0]["decisions_hash"] == results[1]["decisions_hash"]


def test_a_run_that_has_a_result_has_all_its_curves(custom, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    options = {"steps": 16, "num_envs": 4, **custom}
    monkeypatch.setattr("sd_gym.agents.experiment.run.write_result", killed)
    with pytest.raises(KeyboardInterrupt):
        train(CUSTOM, "a2c", tmp_path / "run", **options)
    monkeypatch.undo()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert "test/flops_ratio_with_policy" in events.Tags()["scalars"]
    train(CUSTOM, "a2c", tmp_path / "run", resume=True, **options)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**32}, {"seed": 0.5}, {"steps": "100"}, {"steps": True}])
def test_what_is_no_whole_number_is_refused(wrong, custom, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a whole number from"):
        train(CUSTOM, "a2c", tmp_path / "run", **wrong, **custom)
    assert not (tmp_path / "run").exists()


def test_a_run_that_learned_on_rows_of_the_test_is_no_start(custom, tmp_path):
    parts = {"train": "train[:28]", "validation": "train[28:32]", "test": "train[32:]"}
    others = {"train": parts["test"], "validation": parts["train"], "test": parts["validation"]}
    options = {**custom, "steps": 8, "num_envs": 4}
    train(CUSTOM, "a2c", tmp_path / "first", splits=parts, **options)
    train(CUSTOM, "a2c", tmp_path / "then", start=tmp_path / "first", splits=parts, **options)
    for start in ("first", "then"):
        for sizes in ({}, {"validation_size": 27}):  # all rows that it learned on, or some
            with pytest.raises(ValueError, match="this run learned on rows of this env's validation split"):
                train(CUSTOM, "a2c", tmp_path / "run", start=tmp_path / start, splits=others, **sizes, **options)
    with pytest.raises(ValueError, match="this run learned on rows of this env's validation split"):
        sd_gym.evaluate(CUSTOM, tmp_path / "then", select=True, splits=others, validation_size=20, **custom)
    assert "guarantee" in sd_gym.evaluate(CUSTOM, tmp_path / "then", select=True, splits=parts, **custom)


def test_rows_that_an_env_shares_on_purpose_are_no_leak(custom, tmp_path):
    splits = {"train": "train[:30]", "validation": "train[28:34]", "test": "train[34:]"}
    options = {**custom, "steps": 8, "num_envs": 4, "splits": splits, "overlap": "allow"}
    with pytest.warns(UserWarning, match="overlap"):
        train(CUSTOM, "a2c", tmp_path / "a", train_size=29, **options)
    train(CUSTOM, "a2c", tmp_path / "b", start=tmp_path / "a", **options)


def test_the_runs_before_a_start_count_too(custom, tmp_path):
    first, second, third = "train[:14]", "train[14:28]", "train[28:]"
    options = {**custom, "steps": 8, "num_envs": 4}
    for name, start, learned in (("a", None, first), ("b", "a", second)):
        splits = {"train": learned, "validation": "train[28:30]", "test": "train[30:]"}
        train(CUSTOM, "a2c", tmp_path / name, start=start and tmp_path / start, splits=splits, **options)
    splits = {"train": second, "validation": first, "test": third}
    with pytest.raises(ValueError, match="this run learned on rows of this env's validation split"):
        train(CUSTOM, "a2c", tmp_path / "c", start=tmp_path / "b", splits=splits, **options)


def test_an_objective_has_a_name_that_tells_it_from_others(custom, tmp_path):
    with pytest.raises(ValueError, match="has no name of its own, by which runs are told apart; register it"):
        train(CUSTOM, "a2c", tmp_path / "run", steps=8, objective=lambda quality, *_, **constants: quality, **custom)
