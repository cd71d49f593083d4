"""A dial that was trained on a serving env chooses the operating points of a server."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import sd_gym
from benchmarks import service_times
from sd_gym.envs.serving.config import Point, serving_config
from sd_gym.envs.serving.dial import Dial, Network
from sd_gym.operating_points import OperatingPoint
from sd_gym.serving.dial import Trained
from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.server import service
from tests.envs.conftest import trained
from tests.serving.conftest import client_of

NEVER = -1e9


@pytest.fixture
def run(tmp_path):
    """A run whose dial takes its third point, and its last one where the queue is long."""
    config = serving_config("SD/Serving-TREC-Table-v0", {"deadline": 2.0})
    weight, bias = np.zeros((4, 6)), np.array([NEVER, NEVER, 1.0, NEVER, NEVER, 0.0])
    weight[0, 5] = 1.0
    Dial(config, np.arange(6.0), Network([(weight, bias)])).save(tmp_path)
    return tmp_path


def test_dense_is_the_first_point_of_the_env_and_the_last_one_of_the_server(run):
    dial = Trained(run, np.arange(6.0))
    assert dial.window == 2.0
    assert dial.choose(1, 0.0, 1.0) == 3
    assert dial.choose(100_000, 0.0, 1.0) == 0  # it skips most
    dial.answered(0, 10**6)
    assert dial._dial._recent_loss == pytest.approx(5.0)


def test_a_server_follows_its_dial(run, tmp_path, tiny_tokenizer):
    _, _, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    points = tuple(OperatingPoint(1000.0 * n, 0.0, 0.0, (n + 1) / 6, True) for n in range(6))
    policy = replace(artefact, operating_points=points)
    with client_of(service(policy, Limits(), RequestLimits(timeout=2.0), dial=run)) as client:
        answer = client.post("/predict", json={"inputs": texts[0], "details": True})
        assert not any(answer.json()["skip"])  # the margin of this point skips nothing
        assert "sd_gym_operating_point 3.0" in client.get("/metrics").text
    with pytest.raises(ValueError, match="chooses among 6 operating points, but the server allows 5"):
        service(replace(policy, operating_points=points[:5]), Limits(), RequestLimits(timeout=2.0), dial=run)
    with pytest.raises(ValueError, match=r"within 2 s, but this server has 30 s for a request; .*: --timeout 2$"):
        service(policy, Limits(), RequestLimits(), dial=run)
    with pytest.raises(ValueError, match=r"a dial chooses the operating point.*--allow-loss"):
        service(policy, Limits(), RequestLimits(timeout=2.0), dial=run, max_loss=0.01)
    with pytest.raises(FileNotFoundError, match="no dial"):
        service(policy, Limits(), RequestLimits(), dial=tmp_path / "backbone")
    with pytest.raises(FileNotFoundError, match="sd-gym serve RUN --dial"):
        service(run, Limits(), RequestLimits())


def test_a_dial_of_a_policy_refuses_other_margins(run, tmp_path):
    config = serving_config("SD/Serving-TREC-Table-v0", {})
    margins = [1000.0, 3.0, 2.0, 1.0, 0.0, -1.0]
    points = tuple(Point(margin=margin, per_request=1e-3, per_group=0.0) for margin in margins)
    config = config.model_copy(update={"policy": "runs/policy", "points": points})
    Dial(config, np.zeros(6), Dial.load(run).network).save(tmp_path)
    shifted = np.array(margins[::-1]) - 1.0  # those of a server whose default is another point
    assert Trained(tmp_path, shifted).choose(1, 0.0, 1.0) == 3
    with pytest.raises(ValueError, match="operating points of runs/policy that the server's policy lacks"):
        Trained(tmp_path, np.delete(shifted, 2))


def test_a_dial_may_choose_among_some_of_the_operating_points(run, tmp_path):
    margins = [1000.0, 3.0, 2.0, 1.0, 0.0, -1.0]
    points = tuple(Point(margin=margin, per_request=1e-3, per_group=0.0) for margin in margins)
    config = serving_config("SD/Serving-TREC-Table-v0", {})
    config = config.model_copy(update={"policy": "runs/policy", "points": points})
    Dial(config, np.arange(6.0), Dial.load(run).network).save(tmp_path)
    dial = Trained(tmp_path, [-2.0, -1.0, -0.5, 0.0, 1.0, 1.5, 2.0, 3.0, 1000.0])
    assert dial.points == [1, 3, 4, 6, 7, 8]
    assert dial.choose(1, 0.0, 1.0) == 6  # its third from dense
    assert dial.choose(100_000, 0.0, 1.0) == 1
    dial.answered(6, 10**6)
    assert dial._dial._recent_loss == pytest.approx(2.0)


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_server_decides_at_the_points_of_its_dial(tmp_path, tiny_tokenizer, chosen):
    _, _, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    margins = [-2.0, 0.0, 1.0, 3.0, 1000.0]
    points = tuple(OperatingPoint(margin, 0.0, 0.0, n / 4, True) for n, margin in enumerate(margins))
    policy = replace(artefact, operating_points=points)
    of_env = tuple(Point(margin=margin, per_request=1e-3, per_group=0.0) for margin in (1000.0, 3.0, -2.0))
    config = serving_config("SD/Serving-TREC-Table-v0", {}).model_copy(update={"policy": "it", "points": of_env})
    network = Network([(np.zeros((4, 3)), np.eye(3)[chosen])])
    Dial(config, np.zeros(3), network).save(tmp_path / "dial")
    wanted = sd_gym.load(policy.with_margin(of_env[chosen].margin))(texts)
    settings = RequestLimits(timeout=config.deadline)
    with client_of(service(policy, Limits(), settings, dial=tmp_path / "dial")) as client:
        came = [client.post("/predict", json={"inputs": text, "details": True}).json() for text in texts]
    np.testing.assert_array_equal([one["skip"] for one in came], [one.skip for one in wanted])
    assert any(one.skip.any() for one in wanted)


def test_measured_points_are_evenly_spaced_by_flops():
    flops = [0.1, 0.11, 0.12, 0.4, 0.41, 0.7, 0.9, 1.0, 1.0]
    assert service_times.evenly_spaced(flops, 4) == [0, 3, 5, 8]
    assert service_times.evenly_spaced(flops, 100) == [*range(9)]
    assert service_times.evenly_spaced([1.0], 8) == [0]


def test_measured_points_are_of_the_table_that_the_policy_learned_on(tmp_path, monkeypatch, capsys):
    served = SimpleNamespace(engine=None, points=SimpleNamespace(points=[OperatingPoint(0.0, 0.0, 0.0, 1.0, True)]))
    monkeypatch.setattr(service_times, "service", lambda *args, **options: served)
    monkeypatch.setattr(service_times, "median_seconds", lambda *args: np.ones(6))
    (tmp_path / "config.json").write_text(json.dumps({"env_config": {"table": "tables/classification-trec"}}))
    (tmp_path / "texts.jsonl").write_text("")
    arguments = Namespace(
        run=tmp_path, served=None, input=tmp_path / "texts.jsonl", allow_loss=None, points=8, id="Mine/Serving-v0"
    )
    service_times.print_policy(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("# Mine/Serving-v0: a queue")  # what sd-gym envs shows
    table = yaml.safe_load(printed)["table"]
    assert Path(table, "table.json").is_file()
