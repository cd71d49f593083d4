"""rl_zoo3: training and playing from its command line."""

import importlib.util
import subprocess
import sys

import pytest
import yaml

from tests.ecosystem import ID, SMALL

PINS = ["rl_zoo3==2.9.2", "requests"]  # which it imports and does not require
if importlib.util.find_spec("rl_zoo3") is None:
    pytest.skip("could not import 'rl_zoo3'", allow_module_level=True)

KEYS = [f"{key}:{value}" for key, value in SMALL.items()]


def zoo(module, *arguments):
    common = ["--algo", "ppo", "--env", ID, "--gym-packages", "sd_gym", "--env-kwargs", *KEYS]
    command = [sys.executable, "-m", f"rl_zoo3.{module}", *common, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_train_and_enjoy(tmp_path):
    settings = {"n_timesteps": 64, "policy": "MlpPolicy", "n_steps": 8, "batch_size": 16, "n_envs": 4}
    file = tmp_path / "ppo.yml"
    file.write_text(yaml.safe_dump({"default": settings}))
    folder = ["--folder", str(tmp_path / "logs")]
    zoo("train", "--conf-file", str(file), "--log-folder", folder[1], "--eval-freq", "32", "--seed", "0")
    assert list((tmp_path / "logs").rglob("*.zip"))
    assert "Episode Reward" in zoo("enjoy", *folder, "--no-render", "-n", "4")
