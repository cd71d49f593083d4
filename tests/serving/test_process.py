"""``sd-gym serve`` as a process, under load, until it is told to stop."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

import sd_gym
from tests.envs.conftest import trained, words
from tests.serving.test_engine import few_masks

CLIENTS, SECONDS, GROWTH = 64, 60, 64 * 2**20


@pytest.fixture
def process(tmp_path, tiny_tokenizer):
    """The process, its address, and the model that it serves."""
    _, _, artefact, _ = trained("classification", None, tmp_path, tiny_tokenizer)
    few_masks(artefact).save_pretrained(tmp_path / "artefact")
    command = [sys.executable, "-m", "sd_gym.cli", "serve", tmp_path / "artefact", "--port", "0"]
    options = ["--queue", "8192", "--timeout", "20", "--max-body", "20000"]
    log = (tmp_path / "log").open("w+")
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, text=True) as server:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        while not ready(address):
            time.sleep(0.1)
        yield server, address, sd_gym.load(tmp_path / "artefact")
        if server.poll() is None:
            server.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()


def ready(address):
    try:
        return httpx.get(f"{address}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def resident(process):
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def ask(http, texts):
    response = await http.post("/predict", json={"inputs": [[text] for text in texts], "details": True})
    return response.status_code, response.json()


def assert_right(answers, texts, wanted):
    assert [one["answer"] for one in answers] == [wanted[text].answer for text in texts]
    assert [one["skip"] for one in answers] == [wanted[text].skip.astype(int).tolist() for text in texts]


async def well_behaved(address, number, texts, wanted, until):
    """Ask until a time; how many requests were answered."""
    random, count = np.random.default_rng(number), 0
    async with httpx.AsyncClient(base_url=address, timeout=30) as http:
        while time.monotonic() < until:
            picked = [texts[row] for row in random.integers(len(texts), size=random.integers(1, 9))]
            status, answers = await ask(http, picked)
            assert status == 200
            assert_right(answers, picked, wanted)
            count += 1
    return count


async def badly_behaved(address, until):
    """Hang up, send half a body, too much, and what is no JSON."""
    port = int(address.rpartition(":")[2])
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n"
    bodies = [b'{"inputs": "good"}', b'{"inputs"', b"[" * 19_000, b'{"inputs": "' + b"a" * 40_000 + b'"}', b"\xff"]
    while time.monotonic() < until:
        for body, length in [(body, len(body)) for body in bodies] + [(bodies[0], 500)]:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.format(length).encode() + body)
            await asyncio.sleep(0.01)
            writer.close()


async def everybody(process, address, texts, wanted):
    until = time.monotonic() + SECONDS
    asking = [well_behaved(address, number, texts, wanted, until) for number in range(CLIENTS - 2)]
    disturbing = [badly_behaved(address, until) for _ in range(2)]
    working = asyncio.gather(*asking, *disturbing)
    await asyncio.sleep(SECONDS / 4)
    before = resident(process)
    counts = await working
    assert all(counts[: CLIENTS - 2])
    assert resident(process) - before < GROWTH


async def last_requests(process, address, texts, wanted):
    """What is under way when the signal comes is answered; what comes after it is refused."""
    picked = [texts[row] for row in np.random.default_rng(0).integers(len(texts), size=64)]
    async with httpx.AsyncClient(base_url=address, timeout=30, limits=httpx.Limits(max_connections=CLIENTS)) as http:
        under_way = [asyncio.create_task(ask(http, picked)) for _ in range(CLIENTS)]
        count = 0
        while count < CLIENTS * len(picked) / 4:  # of the rows have arrived
            async with httpx.AsyncClient(base_url=address) as other:
                text = (await other.get("/metrics")).text
            count = float(re.search(r"^te_queue_size (\S+)", text, re.M)[1])
        process.send_signal(signal.SIGTERM)
        outcomes = await asyncio.gather(*under_way, return_exceptions=True)
    answered = [outcome for outcome in outcomes if isinstance(outcome, tuple) and outcome[0] == 200]
    refused = [outcome for outcome in outcomes if isinstance(outcome, tuple) and outcome[0] == 503]
    assert len(answered) >= count / len(picked)  # these were accepted
    for _, answers in answered:
        assert_right(answers, picked, wanted)
    for outcome in outcomes:
        assert outcome in answered or outcome in refused or isinstance(outcome, httpx.ConnectError | httpx.ReadError)
    return len(answered)


@pytest.mark.slow
def test_64_clients_and_a_signal(process):
    server, address, model = process
    random = np.random.default_rng(0)
    texts = sorted({words(random) for _ in range(200)})
    wanted = dict(zip(texts, model(texts), strict=True))
    assert len({one.skip.tobytes() for one in wanted.values()}) > 1
    asyncio.run(everybody(server, address, texts, wanted))
    asyncio.run(last_requests(server, address, texts, wanted))
    assert server.wait(30) in (0, -signal.SIGTERM)
