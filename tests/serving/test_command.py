"""The command line, as far as nothing is served."""

import socket
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from sd_gym.cli import app
from sd_gym.envs.serving.config import serving_config
from sd_gym.envs.serving.dial import Dial, Network
from sd_gym.serving.server import run

runner = CliRunner()


@pytest.mark.parametrize("options", [[], ["--backbone", "."]])
def test_what_is_missing_is_one_line(tmp_path, options):
    result = runner.invoke(app, ["serve", str(tmp_path), *options])
    assert result.exit_code == 2
    assert "no skip_policy.json" in result.output


def test_a_port_that_is_taken_is_one_line(tmp_path, monkeypatch):
    served = SimpleNamespace(engine=SimpleNamespace(groups_masks=True))
    monkeypatch.setattr("sd_gym.serving.server.service", lambda *args, **options: served)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = runner.invoke(app, ["serve", str(tmp_path), "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "Address already in use" in result.output


def test_connections_send_at_once(monkeypatch):
    delays = []

    def serve(server, sockets):
        with socket.create_connection(sockets[0].getsockname()), sockets[0].accept()[0] as connection:
            delays.append(not connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr("uvicorn.Server.run", serve)
    monkeypatch.setattr("gc.freeze", lambda: None)  # these two are for a process that serves
    monkeypatch.setattr("sys.setswitchinterval", lambda seconds: None)
    served = SimpleNamespace(app=lambda: None, settings=SimpleNamespace(timeout=1.0), check=lambda: None)
    run(served, "127.0.0.1", 0, lambda address: None)
    assert delays == [False]


def test_a_dial_reaches_the_service_with_its_deadline(monkeypatch, tmp_path):
    def service(policy, limits, settings, *, dial, **options):
        raise ValueError(f"{dial.name}: {settings.timeout:g} s")

    monkeypatch.setattr("sd_gym.serving.server.service", service)
    config = serving_config("SD/Serving-TREC-Table-v0", {"deadline": 2.0})
    Dial(config, np.zeros(6), Network([(np.zeros((4, 6)), np.zeros(6))])).save(tmp_path / "dial")
    arguments = ["serve", "policy", "--dial", str(tmp_path / "dial")]
    assert "dial: 2 s" in runner.invoke(app, arguments).output
    assert "dial: 3 s" in runner.invoke(app, [*arguments, "--timeout", "3"]).output
