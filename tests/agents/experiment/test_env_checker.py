"""``sd-gym validate`` of an env."""

import pytest
from typer.testing import CliRunner

from sd_gym.cli import app
from sd_gym.envs.checker import check_env

CUSTOM = "SD/Classification-Custom-v0"
QUEUE = "SD/Serving-TREC-Table-v0"


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


def test_a_queue_is_checked_at_each_operating_point():
    checks = check_env(QUEUE, {"requests": 500, "load": 3.0})
    assert all(check.passed for check in checks), checks
    findings = {check.name: check.finding for check in checks}
    assert "+0.00 points lost, FLOPs 100.0%" in findings["dense"]
    assert findings["requests"] == "500 of 500 answered or refused"
    in_time = [float(findings[name].partition("%")[0]) for name in ("dense", "point 5")]
    assert in_time[0] < 60 < in_time[1]


def test_a_queue_whose_requests_rewards_or_dense_answers_are_wrong_fails(monkeypatch):
    from sd_gym.envs.serving.shells import ServingEnv

    step = ServingEnv.step

    def wrong(self, action):
        observation, reward, *over, info = step(self, action)
        return observation, reward - 1.0, *over, info | {"refused": info["refused"] + 1, "cost": info["cost"] + 0.5}

    monkeypatch.setattr(ServingEnv, "step", wrong)
    shown = CliRunner().invoke(app, ["validate", QUEUE, "--set", "requests=100"])
    assert shown.exit_code == 1
    failed = [line.split()[1].rstrip(":") for line in shown.output.splitlines() if line.startswith("FAILED")]
    assert failed == ["requests", "rewards", "dense"]
