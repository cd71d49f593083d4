"""Over HTTP: shapes, status codes, limits; whatever comes, the next request is answered."""

import asyncio
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from sd_gym.serving import server
from sd_gym.serving.app import Service, _cut
from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.ray_app import _Replica
from sd_gym.serving.requests import Predict, RefusedError, body_of
from tests.serving.conftest import StubPoints, client_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    "inputs",
    "details",
    "max_loss",
    "max_flops",
    "point",
    "timeout",
    "raw_scores",
    "parameters",
    "prompt",
    "stop",
]
ALLOWED = {200, 400, 413, 422}


def predict(client, inputs, **more):
    return client.post("/predict", json={"inputs": inputs, **more})


def test_a_body_that_does_not_arrive_is_refused():
    async def main():
        sent = [{"type": "http.request", "body": b'{"inputs": "a', "more_body": True}]

        async def receive():
            return sent.pop() if sent else await asyncio.sleep(60)

        with pytest.raises(RefusedError, match=r"the body did not arrive within 0\.05 s") as refused:
            await body_of(Request({"type": "http", "headers": []}, receive), Predict, 1000, 0.05)
        assert refused.value.status == 408

    asyncio.run(main())


def test_shapes_are_those_of_the_servers_that_people_have(stub):
    _, client = stub
    with client() as client:
        assert predict(client, "a b").json() == {"answer": "A B"}
        assert predict(client, [["a"], ["b c"], {"text": "d"}]).json() == [
            {"answer": text} for text in ("A", "B C", "D")
        ]
        details = predict(client, "a", details=True).json()
        assert details["skip"] == [1, 0]
        assert details["flops_ratio"] == 0.4
        generated = client.post("/generate", json={"inputs": "a b c", "parameters": {"max_new_tokens": 2}})
        assert generated.json() == {"generated_text": "A B"}
        assert generated.headers["x-flops-ratio"] == "0.4000"
        completed = client.post("/v1/completions", json={"prompt": ["the food", "a, b"], "max_tokens": 2, "stop": ","})
        assert [choice["text"] for choice in completed.json()["choices"]] == ["THE FOOD", "A"]
        assert [choice["finish_reason"] for choice in completed.json()["choices"]] == ["length", "stop"]
        assert completed.json()["usage"] == {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10}
        assert client.get("/info").json()["operating_points"][1] == {"highest_loss": 0.0, "flops_ratio": 1.0}
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert '"textarea"' in page.text


def test_requests_of_the_usual_length_are_of_one_kind(stub):
    engine, client = stub
    lengths, prepare = [], engine.prepare
    engine.prepare = lambda inputs: lengths.extend(asked.longest for asked in inputs) or prepare(inputs)
    with client() as client:
        for longest in (None, 8, 7):
            client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": longest}})
    assert lengths == [None, None, 7]


def test_a_request_chooses_its_operating_point(stub):
    engine, client = stub
    with client() as client:
        for more, share in (({}, 0.4), ({"max_loss": 0.0}, 1.0), ({"max_flops": 0.5}, 0.4), ({"point": 1}, 1.0)):
            assert predict(client, "a", details=True, **more).json()["flops_ratio"] == share
        for more in ({"max_flops": 0.1}, {"point": 2}, {"point": 0, "max_loss": 0.1}, {"max_loss": -1}):
            assert predict(client, "a", **more).status_code == 422
    assert len(engine.ran) == 4


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/predict", b"", 400),
        ("/predict", b"{", 400),
        ("/predict", b"\xff\xfe{}", 400),
        ("/predict", b"[1]", 400),
        ("/predict", b'{"inputs": NaN}', 400),
        ("/predict", b"[" * 100_000, 400),
        ("/predict", b'{"inputs": 1' + b"0" * 5000 + b"}", 400),
        ("/predict", b"{}", 422),
        ("/predict", b'{"inputs": ""}', 422),
        ("/predict", b'{"inputs": []}', 422),
        ("/predict", b'{"inputs": ["a", "b", "c"]}', 422),
        ("/predict", b'{"inputs": "\\ud800"}', 422),
        ("/predict", b'{"inputs": {"text": "a", "textpair": "b"}}', 422),
        ("/predict", b'{"inputs": "a", "max_los\\ud800": 1}', 422),
        ("/predict", b'{"inputs": "a", "details": "yes"}', 422),
        ("/predict", b'{"inputs": "a", "timeout": 0}', 422),
        ("/predict", b'{"inputs": "' + b"a" * 4000 + b'"}', 413),
        ("/predict", json.dumps({"inputs": [["a"]] * 9}).encode(), 413),
        ("/generate", b'{"inputs": "a", "parameters": {"do_sample": true}}', 422),
        ("/generate", b'{"inputs": "a", "parameters": {"max_new_tokens": 9}}', 422),
        ("/v1/completions", b'{"prompt": "a", "temperature": 0.7}', 422),
        ("/v1/completions", b'{"prompt": [1, 2]}', 422),
        ("/v1/completions", b'{"prompt": [], "stop": "\\udc00"}', 422),
        ("/v1/completions", b'{"prompt": "a", "model": "\\udc00"}', 422),
        ("/v1/completions", b'{"prompt": "a", "frequency_penalty": 1}', 422),
        ("/nothing", b"{}", 404),
    ],
)
def test_what_is_wrong_is_refused_before_it_queues(stub, path, content, status):
    engine, client = stub
    with client(body=3000 if b"a" * 99 in content else 200_000, inputs=8) as client:
        response = client.post(path, content=content)
        assert response.status_code == status, response.text
        if status != 404:
            error = response.json()["error"]
            assert len(error["message"] if path.startswith("/v1") else error) > 10
        assert predict(client, "next").status_code == 200
    assert engine.ran == ["next"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/predict", "/generate", "/v1/completions"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4).map(json.dumps)
    | st.binary(max_size=40)
    | JSON.map(json.dumps),
)
def test_no_body_does_any_harm(fuzzed, path, content):
    response = fuzzed.post(path, content=content if isinstance(content, bytes) else content.encode())
    assert response.status_code in ALLOWED, response.text
    assert fuzzed.get("/readyz").status_code == 200


@pytest.fixture
def fuzzed(stub):
    with stub[1](inputs=3) as client:
        yield client


def test_a_full_queue_a_deadline_and_an_error_are_told_apart(stub):
    engine, client = stub
    with client(queued_rows=2) as client, ThreadPoolExecutor() as threads:
        waiting = threads.submit(predict, client, "wait")
        engine.started.wait(5)
        assert predict(client, "late", timeout=0.05).status_code == 504
        queued = [threads.submit(predict, client, text) for text in ("a", "break")]
        while client.get("/metrics").text.find("te_queue_size 2.0") < 0:
            pass
        full = predict(client, "b")
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        engine.going.set()
        assert waiting.result().json() == {"answer": "WAIT"}
        assert [one.result().status_code for one in queued] == [200, 500]
        assert "late" not in engine.ran
        assert "it broke" not in queued[1].result().text


def test_it_is_not_ready_before_it_is_warm_and_while_it_drains(stub):
    engine, client = stub
    engine.warm.clear()
    with client(warm=False) as client, ThreadPoolExecutor() as threads:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        assert predict(client, "a").status_code == 503
        engine.warm.set()
        while client.get("/readyz").status_code != 200:
            pass
        waiting = threads.submit(predict, client, "wait")
        engine.started.wait(5)
        client.app.state.service.close()
        assert predict(client, "a").status_code == 503
        assert client.get("/readyz").status_code == 503
        engine.going.set()
        assert waiting.result().json() == {"answer": "WAIT"}


def test_a_server_whose_model_fails_ends(stub, monkeypatch):
    engine, _ = stub
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr("sys.setswitchinterval", lambda seconds: None)

    def warm_up():
        raise MemoryError("no room")

    engine.warm_up = warm_up
    service = Service(engine, StubPoints(), Limits(), RequestLimits())
    with pytest.raises(RuntimeError, match="the model cannot answer, so the server ends"):
        server.run(service, "127.0.0.1", 0, lambda address: None)


def test_an_app_may_start_only_when_its_model_is_warm(stub):
    engine, _ = stub
    service, failing = (Service(engine, StubPoints(), Limits(), RequestLimits()) for _ in range(2))
    service.starts_warm = failing.starts_warm = True
    with client_of(service, warm=False) as client:
        assert predict(client, "a").status_code == 200
        replica = _Replica()
        replica.app = client.app
        replica.check_health()
        service.failure = MemoryError("no room")
        with pytest.raises(RuntimeError, match="the model cannot answer"):
            replica.check_health()
    failing.engine = SimpleNamespace(warm_up=lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="the model cannot answer"), client_of(failing):
        pass


def test_a_signal_ends_a_server_that_is_not_warm_at_once(stub, monkeypatch):
    """The thread that warms the model up cannot be interrupted."""

    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", end)
    engine, client = stub
    engine.warm.clear()
    with client(warm=False) as client:
        service = client.app.state.service
        starting = server._Server(uvicorn.Config(client.app), service)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            starting.handle_exit(signal.SIGTERM, None)
        engine.warm.set()
        while service.batcher is None:
            pass
        starting.handle_exit(signal.SIGTERM, None)
        assert starting.should_exit
        assert not service.is_ready


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/predict", {"parameters": {}, "truncation_direction": "Right"}),
        ("/generate", {"parameters": None, "stream": False}),
        ("/generate", {"parameters": {"return_full_text": False}}),
    ],
)
def test_fields_that_clients_always_send_are_taken(stub, path, fields):
    _, client = stub
    with client() as client:
        assert client.post(path, json={"inputs": "a", **fields}).status_code == 200


def test_texts_of_very_many_characters_hold_nobody_up(stub):
    engine, client = stub
    with client(characters=9) as client:
        refused = predict(client, [["a"], ["a b c d e f"]])
        assert (refused.status_code, refused.json()["error"]) == (413, "input 1: expected at most 9 characters, got 11")
        assert predict(client, "a b c d e").status_code == 200
    assert engine.ran == ["a b c d e"]


@pytest.mark.parametrize("body", [b'{"inputs": "gone"}', b'{"inp'])
def test_who_hangs_up_is_dropped_without_noise(stub, body, caplog):
    """While the answer is waited for, and in the middle of the body."""
    engine, client = stub
    whole = body.endswith(b"}")
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
    sent = []

    async def hang_up(app):
        messages = [{"type": "http.request", "body": body, "more_body": not whole}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)

    with client() as client, ThreadPoolExecutor() as threads:
        waiting = threads.submit(predict, client, "wait")
        engine.started.wait(5)
        client.portal.call(hang_up, client.app)
        engine.going.set()
        assert waiting.result().status_code == 200
        assert predict(client, "next").status_code == 200
    assert engine.ran == ["wait", "next"]
    assert sent[0]["status"] == 499
    assert not caplog.records


def test_metrics_have_the_names_that_people_know(stub):
    _, client = stub
    with client() as client:
        predict(client, [["a"], ["b c"]])
        predict(client, 3)
        families = text_string_to_metric_families(client.get("/metrics").text)
        values = {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
    assert values["te_request_count_total", "/predict"] == 2
    assert values["te_request_success_total", "/predict"] == 1
    assert values["te_request_failure_total", "422"] == 1
    assert values["te_batch_next_size_sum",] == 2
    assert values["te_batch_next_tokens_sum",] in (4, 3)
    assert values["sd_gym_flops_ratio_sum",] == pytest.approx(0.8)
    flops = [values["sd_gym_flops_total", what] for what in ("promised", "executed", "dense")]
    assert flops == pytest.approx([80, 100, 200])


def test_values_of_openais_fields_that_change_nothing_are_taken(stub):
    _, client = stub
    fields = {"temperature": 0, "top_p": 1, "n": 1, "best_of": 1, "echo": False, "stream": False}
    fields |= {"presence_penalty": 0, "frequency_penalty": 0}
    with client() as client:
        for nothing in (fields, dict.fromkeys([*fields, "suffix", "logprobs", "logit_bias", "stream_options"])):
            completed = client.post("/v1/completions", json={"prompt": "a b", **nothing})
            assert completed.json()["choices"][0]["text"] == "A B"


def test_a_text_is_cut_before_the_first_of_all_stops():
    for stops in (["D", "END"], ["END", "D"]):
        assert _cut("x END y", stops) == "x "
    assert _cut("x", ["", "y"]) == "x"
