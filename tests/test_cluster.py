"""Work on a Ray cluster; with a real one see tests/ecosystem/test_ray.py."""

import signal
import subprocess
import sys
from multiprocessing import get_context
from threading import Thread

import pytest

from sd_gym import cluster
from sd_gym.errors import MissingExtraError


class NoGpu:
    """Stands for ``ray`` on a cluster of one core."""

    def cluster_resources(self):
        return {"CPU": 1.0}


def test_a_cluster_without_a_gpu_is_refused_instead_of_waited_for():
    with pytest.raises(ValueError, match="the Ray cluster has no GPU"):
        next(cluster.in_order(NoGpu(), lambda: str, [1], on_gpu=True))


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="pip install 'sd-gym\\[ray\\]'"):
        cluster.connect("auto")


def test_processes_that_start_ignore_interrupts_from_the_beginning():
    """A worker imports for seconds before its own code runs; Ctrl-C would print a traceback there."""
    before, asks = signal.getsignal(signal.SIGINT), "import signal; print(signal.getsignal(signal.SIGINT).name)"
    with cluster.without_interrupts():
        asked = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "SIG_IGN"
    assert signal.getsignal(signal.SIGINT) is before


def test_workers_that_another_thread_starts_ignore_interrupts_too():
    end, workers_end = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_tells, args=(workers_end,))
    thread = Thread(target=process.start)
    thread.start()
    thread.join()
    assert end.recv() == signal.SIG_IGN
    process.join()


def _tells(connection):
    cluster.prepare_worker([])
    connection.send(signal.getsignal(signal.SIGINT))
