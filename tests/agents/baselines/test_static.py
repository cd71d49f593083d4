"""One mask for all inputs."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.baselines.static import MASKS, nested_path
from sd_gym.agents.experiment.run import train
from sd_gym.agents.learning.decisions import score_decisions
from sd_gym.agents.runs.verdict import Verdict, verdict
from stable_baselines3.common.logger import configure

import sd_gym
from sd_gym.envs.actions import read_masks, write_masks
from tests.agents.baselines.conftest import everything, nobody


def test_the_static_agent_finds_the_best_of_all_masks(settings, tmp_path):
    """By what policy rows say; the one that is selected is shown to keep the quality on the selection rows."""
    settings["epsilon"] = 0.3  # which few instances without a loss show, if no certainty is asked for
    run = tmp_path / "run"
    result = train("SD/Classification-Custom-v0", "static", run, steps=1, **settings, confidence=0.5)
    core = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped.core
    masks, quality, ratio = everything(core, core.split("train"))
    fitting = quality[0].mean() - quality.mean(axis=1) <= 0.3
    best = masks[fitting][ratio[fitting].mean(axis=1).argmin()]
    test = core.split("test")
    rows = np.arange(len(test))
    expected = test.costs.flops_ratio(rows, np.tile(best, (len(rows), 1))).mean()
    assert result["last_policy"]["flops_ratio"] == pytest.approx(expected)
    validation = core.split("validation")
    rows, mask = np.arange(len(validation)), np.array([[*result["skip_rate"].values(), 0]]).astype(int)
    scored = score_decisions(core, validation, rows, np.tile(mask, (len(rows), 1)))
    assert result["decisions_used"] == 1
    assert verdict(scored["quality"], scored["quality_ref"], 0.3, confidence=0.5) == Verdict.KEPT


def test_the_static_agent_skips_whole_layers(settings, tmp_path):
    settings |= {"epsilon": 1.0, "per": "layer"}
    train("SD/Classification-Custom-v0", "static", tmp_path / "run", steps=1, **settings, confidence=0.5)
    masks = read_masks(tmp_path / "run" / MASKS, np.full(7, 2))
    assert len(masks) == 2**3  # all there are
    np.testing.assert_array_equal(masks[:, 0:6:2], masks[:, 1:6:2])


def test_a_table_of_some_masks_knows_no_layers(settings, tmp_path):
    sd_gym.tabulate("SD/Classification-Custom-v0", tmp_path / "table", decisions="random:8", **settings)
    env = gym.make_vec("SD/Table-v0", num_envs=1, table=str(tmp_path / "table")).unwrapped
    with pytest.raises(ValueError, match="per=layer"):
        make_agent("static", env, per="layer").learn(1, configure(str(tmp_path), []), nobody)


@pytest.mark.parametrize("stages", [["first"], ["first", "encoder.1", "answer"]])
def test_a_path_ends_where_everything_is_skipped_though_answers_are_accepted(stages, settings, tmp_path):
    core = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings, stages=stages).unwrapped.core
    skipped = np.tril(np.ones((7, 6), dtype=np.int64), -1)
    path = np.pad(skipped, ((0, 0), (0, len(core.nvec) - 6)))
    write_masks(np.concatenate([path, path[:3]]), tmp_path / MASKS)  # as static does, which finds another one
    np.testing.assert_array_equal(nested_path(tmp_path, core), path)
    write_masks(path[:-1], tmp_path / MASKS)
    with pytest.raises(ValueError, match="Leave path out"):
        nested_path(tmp_path, core)
