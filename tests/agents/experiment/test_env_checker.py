"""``sd-gym validate`` of an env."""

import pytest
from typer.testing import CliRunner

from sd_gym.cli import app
from sd_gym.envs.checker import check_env

CUSTOM = "SD/Classification-Custom-v0"


def test_an_env_is_checked(hash_run):
    settings = {"dataset": str(hash_run / "reviews.jsonl"), "backbone": str(hash_run / "backbone")}
    checks = {check.name: check for check in check_env(CUSTOM, settings)}
    assert all(check.passed for check in checks.values()), checks
    assert "64 tried" in checks["best of all decisions"].finding
    assert "FLOPs 100.0%" in checks["nothing skipped"].finding
    with pytest.raises(ValueError, match=r"reward.vector"):
        check_env(CUSTOM, {**settings, "vector_reward": True})


def test_an_env_whose_rewards_or_seeds_are_wrong_fails(hash_run, monkeypatch):
    from sd_gym.envs.single import SwitchableEnv

    settings = [f"dataset={hash_run / 'reviews.jsonl'}", f"backbone={hash_run / 'backbone'}"]
    step, reset = SwitchableEnv.step, SwitchableEnv.reset

    def too_much(self, action):
        observation, reward, *rest = step(self, action)
        return observation, reward + 2.0, *rest

    def always_the_same(self, *, seed=None, options=None):
        return reset(self, seed=1 if seed is not None else None, options=options)

    monkeypatch.setattr(SwitchableEnv, "step", too_much)
    monkeypatch.setattr(SwitchableEnv, "reset", always_the_same)
    options = [option for setting in settings for option in ("--set", setting)]
    shown = CliRunner().invoke(app, ["validate", CUSTOM, *options])
    assert shown.exit_code == 1
    failed = [line for line in shown.output.splitlines() if line.startswith("FAILED")]
    assert any("rewards" in line for line in failed)
    assert any("other seed, other episode: 1 different" in line for line in failed)
