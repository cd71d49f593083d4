"""The same seed and the same data give the same run, byte for byte; other data are noticed."""

import json
import shutil
from functools import cache

import gymnasium as gym
import pytest
import torch
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.registry import make_agent
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.envs.core import _backbone_core
from sd_gym.execution.scoring import Scoring
from tests.agents.conftest import cut_off

CUSTOM = "SD/Classification-Custom-v0"


def forget():
    """What a new process does not know."""
    _backbone_core.cache_clear()
    torch.seed()


def splits_of(settings):
    core = gym.make(CUSTOM, **settings).unwrapped.core
    return [core.split(name) for name in ("train", "validation", "test")]


def weights(folder):
    return (folder / "policy.safetensors").read_bytes()


@pytest.mark.parametrize("algo", ["dense", "static", "hash", "random", "every-other"])
def test_a_control_is_the_same_for_the_same_seed_and_so_is_what_starts_from_it(algo, settings, tmp_path):
    for name in ("one", "other"):
        forget()
        train(CUSTOM, algo, tmp_path / name, steps=1, seed=3, **settings)
        start = {"start": tmp_path / name, "num_envs": 8, "n_steps": 8}
        train(CUSTOM, "ppo", tmp_path / f"{name}-ppo", steps=64, seed=3, **{**settings, **start})
    assert weights(tmp_path / "one") == weights(tmp_path / "other")
    assert weights(tmp_path / "one-ppo") == weights(tmp_path / "other-ppo")


def test_another_seed_has_other_weights(settings):
    env = gym.make_vec(CUSTOM, num_envs=1, **settings).unwrapped
    one, other = (make_agent("static", env, seed=seed).policy().body[0].weight for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.fixture(scope="module")
def on_likelihoods(custom):
    """What runs are asked for whose scores depend, in their last bits, on the rows that they are computed beside."""
    return {"steps": 1_000, **custom, "quality": "likelihood", "num_envs": 16}


@pytest.fixture(scope="module")
def alone(on_likelihoods, tmp_path_factory):
    """The folder and the result of the run of an agent in a process of its own: one for all tests."""

    @cache
    def run(algo):
        folder = tmp_path_factory.mktemp("alone") / algo
        forget()
        return folder, train(CUSTOM, algo, folder, seed=3, **on_likelihoods)

    return run


def assert_same(folder, result, expected):
    assert weights(folder) == weights(expected[0])
    assert {**result, "time": None} == {**expected[1], "time": None}


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_killed_run_on_likelihoods_ends_as_the_uninterrupted_one(algo, alone, on_likelihoods, tmp_path):
    expected = alone(algo)
    for after in (0, 700):  # at first the dense backbone alone was scored
        cut = tmp_path / str(after)
        forget()
        cut_off(CUSTOM, algo, cut, seed=3, **on_likelihoods, after=after)
        forget()
        assert_same(cut, train(CUSTOM, algo, cut, seed=3, **on_likelihoods, resume=True), expected)


def test_a_run_does_not_depend_on_what_ran_before_in_the_process(alone, on_likelihoods, tmp_path):
    expected = alone("ppo")
    forget()
    train(CUSTOM, "ppo", tmp_path / "before", seed=1, **on_likelihoods)
    assert_same(tmp_path / "after", train(CUSTOM, "ppo", tmp_path / "after", seed=3, **on_likelihoods), expected)


def test_all_runs_of_a_process_share_the_dense_scores(settings, tmp_path, monkeypatch):
    dense, run = [], Scoring.run

    def counted(self, rows, decisions):
        dense.extend((id(self), row) for row in rows[~decisions.any(axis=1)].tolist())
        return run(self, rows, decisions)

    monkeypatch.setattr(Scoring, "run", counted)
    forget()
    for seed in (0, 1):
        train(CUSTOM, "ppo", tmp_path / str(seed), steps=100, seed=seed, **{**settings, "num_envs": 16})
        splits = splits_of(settings)
        assert len(dense) == len(set(dense)) == sum(len(split) for split in splits)


def test_a_run_that_needs_few_training_instances_does_not_score_all(settings, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(Scoring, "score_dense", lambda self, *of: scored.append(len(self._encoded)))
    forget()
    train(CUSTOM, "ppo", tmp_path / "run", steps=2, **{**settings, "num_envs": 2})
    assert len(splits_of(settings)[0]) > 2
    assert len(splits_of(settings)[0]) not in scored


def change(file, row):
    lines = file.read_text().splitlines()
    lines[row] = json.dumps({**json.loads(lines[row]), "text": "the room was not awful"})
    file.write_text("\n".join(lines) + "\n")
    forget()


@pytest.mark.parametrize(("row", "split"), [(0, "train"), (8, "validation"), (9, "test")])
def test_changed_data_are_noticed_with_the_split(row, split, settings, reviews, tmp_path):
    run = tmp_path / "run"
    train(CUSTOM, "hash", run, steps=1, **settings)
    change(reviews, row)
    words = f"the data have changed: {split} was .* of {reviews} .*, and is "
    with pytest.raises(ValueError, match=words):
        load_run(run)
    with pytest.raises(ValueError, match=words):
        sd_gym.evaluate(CUSTOM, run, "validation")
    shown = CliRunner().invoke(app, ["evaluate", str(run)])
    assert shown.exit_code == 2
    assert f"the data have changed: {split} was" in " ".join(shown.stderr.split())
    sd_gym.evaluate(CUSTOM, run, dataset=str(reviews))  # who names data means these


def test_changed_data_are_noticed_by_who_resumes(settings, reviews, tmp_path):
    arguments = {"steps": 1_000, **{**settings, "num_envs": 16}}
    cut_off(CUSTOM, "ppo", tmp_path / "run", **arguments, after=700)
    change(reviews, 8)
    with pytest.raises(ValueError, match="the data have changed: validation was"):
        train(CUSTOM, "ppo", tmp_path / "run", **arguments, resume=True)


def tune(backbone, folder):
    """Other weights in the place of the former ones, as a preparation into the same folder would leave them."""
    model = AutoModelForSequenceClassification.from_pretrained(backbone)
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(folder)
    forget()


def test_a_backbone_that_was_overwritten_is_noticed(settings, tiny_backbone, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(tiny_backbone, own)
    settings = {**settings, "backbone": str(own), "num_envs": 16}
    first, other = folders = [tmp_path / "first", tmp_path / "other"]
    for seed, folder in enumerate(folders):
        if seed:
            tune(tiny_backbone, own)
        train(CUSTOM, "a2c", folder, steps=64, seed=seed, **settings)
    with pytest.raises(ValueError, match=f"the backbone '{own}' has other weights than in training"):
        load_run(first)
    with pytest.raises(ValueError, match="other weights"):
        sd_gym.evaluate(CUSTOM, first)
    sd_gym.evaluate(CUSTOM, first, backbone=str(own))  # who names a backbone means this one
    assert [row["seeds"] for row in sd_gym.compare([first, other])] == [1, 1]  # no seeds of one agent
