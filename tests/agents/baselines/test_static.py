"""One mask for all inputs."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.baselines.static import MASKS
from sd_gym.agents.experiment.run import train
from sd_gym.agents.learning.decisions import halves
from sd_gym.agents.runs.verdict import Verdict, verdict
from stable_baselines3.common.logger import configure

import sd_gym
from sd_gym.envs.actions import read_masks
from tests.agents.baselines.conftest import everything, nobody


def test_the_static_agent_finds_the_best_of_all_masks(settings, tmp_path):
    settings["epsilon"] = 0.3  # which two instances without a loss show, if no certainty is asked for
    result = train("SD/Classification-Custom-v0", "static", tmp_path / "run", steps=1, settings=settings, confidence=0.5)
    assert result["decisions_used"] == 1
    core = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped.core
    split = core.split("validation")
    _, quality, ratio = everything(core, split)
    kept = [
        all(verdict(own[rows], quality[0, rows], 0.3, errors=0) == Verdict.KEPT for rows in halves(split))
        for own in quality
    ]
    best = ratio[kept].mean(axis=1).min()
    assert best < 1
    mask = np.array([[*result["skip_rate"].values(), 0]]).astype(int)
    assert split.costs.flops_ratio(np.arange(len(split)), np.tile(mask, (len(split), 1))).mean() == pytest.approx(best)


def test_the_static_agent_skips_whole_layers(settings, tmp_path):
    settings |= {"epsilon": 1.0, "per": "layer"}
    train("SD/Classification-Custom-v0", "static", tmp_path / "run", steps=1, settings=settings, confidence=0.5)
    masks = read_masks(tmp_path / "run" / MASKS, np.full(7, 2))
    assert len(masks) == 2**3  # all there are
    np.testing.assert_array_equal(masks[:, 0:6:2], masks[:, 1:6:2])


def test_a_table_of_some_masks_knows_no_layers(settings, tmp_path):
    sd_gym.tabulate("SD/Classification-Custom-v0", tmp_path / "table", decisions="random:8", **settings)
    env = gym.make_vec("SD/Table-v0", num_envs=1, table=str(tmp_path / "table")).unwrapped
    with pytest.raises(ValueError, match="per=layer"):
        make_agent("static", env, per="layer").learn(1, configure(str(tmp_path), []), nobody)
