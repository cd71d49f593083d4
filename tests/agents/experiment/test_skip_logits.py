"""The odds that a run gives to skipping, for a backbone that is tuned under it."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.skip_logits import skip_logits_of_run
from sd_gym.agents.experiment.trained import load_run
from typer.testing import CliRunner

from sd_gym.cli import app
from tests.agents.conftest import STAGED, STAGES, bold, staged_settings, walked


@pytest.mark.parametrize("stages", [STAGES, ["encoder.1"]])
def test_a_backbone_is_tuned_under_what_each_stage_decides(staged_env, stages, tmp_path):
    """The odds have the sign of the decisions; of what no stage decides, they say that it runs."""
    keys = {**staged_settings(staged_env), "stages": stages}
    train(STAGED, "ppo", tmp_path / "run", steps=32, **keys, confidence=0.5)
    policy = bold(gym.make_vec(STAGED, num_envs=2, **keys).unwrapped, tmp_path / "run")
    _, odds = skip_logits_of_run(tmp_path / "run", {})
    core = load_run(tmp_path / "run")[1]
    seen, _, decisions = walked(core, policy)
    np.testing.assert_array_equal(odds["train"] > 0, decisions[:, :-1].astype(bool))
    for columns, observations in zip(core.columns, seen, strict=True):
        np.testing.assert_array_equal(odds["train"][:, columns], policy.skip_logits(observations)[:, columns])
    assert (odds["train"][:, : core.columns[0].start] == -np.inf).all()
    options = ["--policy", tmp_path / "run", "--output", tmp_path / "tuned", "--steps", 3]
    result = CliRunner().invoke(app, ["prepare", *map(str, options)])
    assert result.exit_code == 0, result.output
