"""Ray: a cluster trains the runs of a comparison."""

import pytest
import torch
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from tests.ecosystem import ID, SMALL

PINS = ["ray==2.60.0"]
ray = pytest.importorskip("ray")
SETTINGS = {"steps": 256, "seeds": 2, "controls": False, **SMALL}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there, so that the last bits of sums are the same
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
    yield
    ray.shutdown()
    torch.set_num_threads(threads)


def test_runs_are_those_of_this_machine(tmp_path):
    there = sd_gym.train_all([ID], ["ppo"], tmp_path / "there", ray="auto", **SETTINGS)
    here = sd_gym.train_all([ID], ["ppo"], tmp_path / "here", **SETTINGS)
    assert [word.state for word in there] == [word.state for word in here] == ["finished"] * 2
    for ours, theirs in zip(there, here, strict=True):
        policies = [(word.run.folder / "policy.safetensors").read_bytes() for word in (ours, theirs)]
        assert policies[0] == policies[1]
    again = sd_gym.train_all([ID], ["ppo"], tmp_path / "there", ray="auto", **SETTINGS)
    assert [word.state for word in again] == ["kept"] * 2


def test_a_run_that_fails_stops_no_other(tmp_path):
    asked = [ID, "--algos", "ppo", "--no-controls", "--seeds", "2", "--steps", "256", "--output", str(tmp_path)]
    (tmp_path / ID.removeprefix("SD/").removesuffix("-v0") / "ppo-0").mkdir(parents=True)
    (tmp_path / ID.removeprefix("SD/").removesuffix("-v0") / "ppo-0" / "mine.txt").write_text("mine")
    done = CliRunner().invoke(app, ["compare", *asked, "--ray", "auto", *(f"--set={k}={v}" for k, v in SMALL.items())])
    assert done.exit_code == 1
    assert "ppo-0: FileExistsError" in done.output
    assert "ppo-1: finished" in done.output


def test_jobs_are_not_asked_for_as_well(tmp_path):
    with pytest.raises(ValueError, match="leave out jobs"):
        sd_gym.train_all([ID], ["ppo"], tmp_path, ray="auto", jobs=2, **SETTINGS)
