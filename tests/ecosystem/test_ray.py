"""Ray: a cluster trains runs, fills tables and answers files; a machine that dies costs nothing."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from sd_gym.agents.experiment.tune import tune
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.inference.bulk import OnCluster, run_file
from tests.ecosystem import ID, SMALL

PINS = ["ray==2.60.0"]
ray = pytest.importorskip("ray")
SETTINGS = {"steps": 256, "seeds": 2, "controls": False, **SMALL}
LOCAL = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 2**27, "log_to_driver": False}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there, so that the last bits of sums are the same
    ray.init(**LOCAL)
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


@pytest.fixture
def two_machines():
    """A cluster of two node processes of one core; gives its address, and what kills the second one."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    node = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    second = cluster.add_node(num_cpus=1, object_store_memory=2**27)
    yield cluster.address, lambda: cluster.remove_node(second, allow_graceful=False)
    ray.shutdown()
    cluster.shutdown()
    ray.init(**LOCAL)  # for the tests that follow


@pytest.mark.slow
def test_a_table_survives_a_dead_machine(two_machines, tmp_path):
    address, kill = two_machines
    done = []

    def on_progress(count, total):
        done.append(count)
        if len(done) == 2:  # after the first chunk
            kill()

    settings = {"decisions": "random:8", "instances": 600}
    sd_gym.tabulate(ID, tmp_path / "there", ray=address, on_progress=on_progress, **settings)
    sd_gym.tabulate(ID, tmp_path / "here", **settings)
    assert len(done) > 2
    for name in ("train", "validation", "test"):
        there, here = ((tmp_path / place / f"{name}.safetensors").read_bytes() for place in ("there", "here"))
        assert there == here


@pytest.mark.slow
def test_a_run_over_a_file_survives_a_dead_machine(two_machines, tmp_path):
    address, kill = two_machines
    run = tmp_path / "run"
    sd_gym.train(ID, "ppo", run, steps=256, **SMALL)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the food was good {n}"}) + "\n" for n in range(640)))
    load = partial(sd_gym.load, str(run))
    chunks = []

    def on_chunk(line, outcome):
        chunks.append(line)
        if len(chunks) == 1:
            kill()

    there = {"chunk": 64, "on_cluster": OnCluster(address, load), "on_chunk": on_chunk}
    outcome = run_file(load(), texts, tmp_path / "there.jsonl", **there)
    run_file(load(), texts, tmp_path / "here.jsonl", chunk=64)
    assert outcome.rows == 640
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert chunks == list(range(64, 641, 64))


@pytest.mark.slow
def test_replicas_answer_although_a_machine_dies(two_machines, tmp_path):
    address, kill = two_machines
    sd_gym.train(ID, "ppo", tmp_path / "run", steps=256, **SMALL)
    texts = [f"the food was good {number}" for number in range(40)]
    wanted = [one.answer for one in sd_gym.load(tmp_path / "run")(texts)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served = {"import_path": "sd_gym.serving.ray_app:app", "args": {"policy": str(tmp_path / "run")}}
    served["deployments"] = [{"name": "sd_gym", "num_replicas": 2}]
    config = {"proxy_location": "HeadOnly", "http_options": {"port": port}, "applications": [served]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(tmp_path / "serve.yaml"), "--address", address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answer(text):
        for _ in range(120):  # also what was there when it died is asked again
            with contextlib.suppress(httpx.HTTPError):
                asked = {"inputs": text, "details": True}
                came = httpx.post(f"http://127.0.0.1:{port}/predict", json=asked, timeout=30)
                if came.status_code == 200:
                    return came.json()["answer"]
            time.sleep(0.5)
        raise AssertionError("no answer in a minute")

    try:
        came = [answer(text) for text in texts[:10]]
        kill()
        came += [answer(text) for text in texts[10:]]
    finally:
        process.terminate()
        process.wait()
    assert came == wanted


@pytest.mark.slow
def test_trials_are_shared(tmp_path):
    best = tune(ID, "ppo", tmp_path / "study", trials=3, steps=256, ray="auto", on_trial=(trials := []).append, **SMALL)
    assert best.exists()
    assert [trial.number for trial in trials] == [0, 1, 2]
