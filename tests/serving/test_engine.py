"""What is served equals what ``sd_gym.load(policy)(texts)`` answers, whoever asks at the same time."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sd_gym
from sd_gym.operating_points import OperatingPoint
from sd_gym.serving.engine import Asked, GraphEngine, OperatingPoints, TextEngine
from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.server import service
from tests.envs.conftest import trained
from tests.serving.conftest import client_of

POINTS = tuple(
    OperatingPoint(margin, 0.0, loss, share, True) for margin, loss, share in ((0, 0.01, 0.4), (1000.1, 0, 1))
)


def few_masks(policy):
    """The same policy with three masks to choose among."""
    book = [[0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0]]
    if policy.has_answer_stage:
        book = [[*mask, -1] for mask in book] + [[-1] * 7 + [choice] for choice in (0, 1)]
    policy.network.codebook = torch.tensor(book)
    return policy


def served(client, path, given):
    response = client.post(path, json={"inputs": given, "details": True})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("task", "ranking", "stages", "few"),
    [
        ("classification", None, ["first"], True),
        ("classification", "idf", ["first"], False),
        ("classification", None, ["first", "answer"], True),
        ("classification", None, ["first", "encoder.1", "answer"], False),
        ("pairs", None, ["first"], True),
        ("scores", None, ["first"], True),
        ("extracted", None, ["first"], True),
        ("prompted", None, ["first"], False),
    ],
)
def test_answers_are_those_of_a_call(task, ranking, stages, few, tmp_path, tiny_tokenizer):
    _, _, artefact, texts = trained(task, ranking, tmp_path, tiny_tokenizer, stages=stages)
    artefact = few_masks(artefact) if few else artefact
    wanted = sd_gym.load(artefact)(texts)
    own = service(artefact, Limits(rows=4), RequestLimits())
    assert own.engine.groups_masks == few
    with client_of(own) as client, ThreadPoolExecutor(6) as threads:
        given = [list(text) if isinstance(text, tuple) else text for text in texts]
        came = list(threads.map(lambda one: served(client, "/predict", one), given))
        together = served(client, "/predict", [one if isinstance(one, dict | list) else [one] for one in given])
        gives = {"scores": "score", "extracted": "span", "prompted": "text"}.get(task, "label")
        assert client.get("/info").json()["gives"] == gives
    for answers in (came, together):
        assert [one["answer"] for one in answers] == [one.answer for one in wanted]
        np.testing.assert_array_equal([one["skip"] for one in answers], [one.skip for one in wanted])
        assert [one["went_on"] for one in answers] == [one.went_on for one in wanted]
        np.testing.assert_allclose([one["flops_ratio"] for one in answers], [one.flops_ratio for one in wanted])
    if task == "classification":
        for one in came:
            assert next(iter(one["scores"])) == one["answer"]
            assert sum(one["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert (came[0]["scores"] is None) == (task in ("scores", "extracted", "prompted"))


def test_groups_are_of_one_mask_and_operating_points_decide_at_once(tmp_path, tiny_tokenizer):
    _, _, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    policy = few_masks(replace(artefact, operating_points=POINTS))
    model = sd_gym.load(policy)
    points = OperatingPoints(POINTS)
    assert (points.index(None, None), points.index(0.0, None), points.index(None, 0.5)) == (None, 1, 0)
    assert [point.flops_ratio for point in OperatingPoints(POINTS, allow_loss=0.0).points] == [0.4, 1]
    assert [point.flops_ratio for point in OperatingPoints(POINTS, allow_flops=0.5).points] == [0.4]
    with pytest.raises(ValueError, match="none that were validated"):
        OperatingPoints(()).index(0.1, None)
    with pytest.raises(ValueError, match="does not allow the operating point of these limits; it allows 40%"):
        OperatingPoints(POINTS, allow_flops=0.5).index(0.0, None)
    engine = TextEngine(model, points, range(2))
    usual, dialled, asked = (engine.prepare([Asked([text], point) for text in texts]) for point in (0, None, 1))
    assert len({row.masks[0] for row in usual}) > 1
    assert [row.masks[0] for row in dialled] == [row.masks[0] for row in usual] == [row.masks[1] for row in usual]
    assert all(row.is_dialled for row in dialled)
    assert not any(row.is_dialled for row in (*usual, *asked))
    assert {row.masks[1] for row in dialled} == {row.masks[0] for row in asked}
    assert len({row.masks[0] for row in asked}) == 1
    dense = engine.run(dialled, 1)
    assert not any(one.answer.skip.any() for one in dense)
    assert [one.answer.answer for one in dense] == [one.answer for one in model(texts, dense=True)]
    group = [row for row in usual if row.masks[0] == usual[0].masks[0]]
    for one in engine.run(group, 0):
        assert one.promised <= one.executed * (1 + 1e-9)  # which has padding
        assert one.promised / one.dense == pytest.approx(one.answer.flops_ratio)
    assert all(value >= 0 for value in engine.warm_up())


@pytest.mark.parametrize("task", ["summarization", "prompted"])
def test_of_a_row_alone_all_that_was_promised_was_executed(task, tmp_path, tiny_tokenizer):
    """Also where its text is written again, and has another length then."""
    _, _, artefact, texts = trained(task, None, tmp_path, tiny_tokenizer, stages=("first", "answer"))
    model = sd_gym.load(artefact)
    engine, went_on, lengths = TextEngine(model, OperatingPoints(()), [0]), [], set()
    for row in engine.prepare([Asked([text] if isinstance(text, str) else [*text.values()]) for text in texts]):
        (one,) = engine.run([row], 0)
        assert one.executed == pytest.approx(one.promised)
        went_on.append(one.answer.went_on)
        lengths.add(one.generated)
    assert len({*went_on}) == 2
    assert len(lengths) > 1


@pytest.mark.parametrize("task", ["classification", "summarization"])
def test_executed_flops_are_those_of_the_passes_that_ran(task, tmp_path, tiny_tokenizer, monkeypatch):
    """A group is divided into passes again, here because of their memory."""
    _, _, artefact, texts = trained(task, None, tmp_path, tiny_tokenizer)
    model = sd_gym.load(artefact)
    model.model.set_attn_implementation("eager")  # torch's counter knows no other
    engine = TextEngine(model, OperatingPoints(()), [0])
    rows = engine.prepare([Asked([text]) for text in texts])
    monkeypatch.setattr("sd_gym.execution.passes.PASS_TOKENS", 60)
    engine.run(rows[:1], 0)  # the FLOPs of the policy are counted once, by the same counter
    own = model.own_flops(model.split([[text] for text in texts])).sum()
    with FlopCounterMode(display=False) as counter:
        served = engine.run(rows, 0)
    counted = pytest.approx(counter.get_total_flops(), rel=0.01 * (task == "summarization"))  # texts end early
    assert sum(one.executed for one in served) - own == counted


@pytest.mark.parametrize("stages", [["first"], ["first", "answer"]])
def test_exported_graphs_are_served_alike(stages, tmp_path, tiny_tokenizer):
    _, _, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer, stages=stages)
    if len(stages) > 1:
        masks = [[1, 0, 1, 0, 0, 0, 0, -1], [-1] * 7 + [0], [-1] * 7 + [1]]
        artefact.network.codebook = torch.tensor(masks)
    else:
        artefact = few_masks(artefact)
    artefact = replace(artefact, operating_points=POINTS)
    sd_gym.export(artefact, tmp_path / "onnx")
    model = sd_gym.onnx.load(tmp_path / "onnx")
    engine, wanted = GraphEngine(model, OperatingPoints(POINTS), range(2)), model(texts)
    dialled, bold, safe = (engine.prepare([Asked([text], point) for text in texts]) for point in (None, 0, 1))
    assert [row.is_dialled for row in (dialled[0], bold[0])] == [True, False]
    assert [row.masks for row in dialled] == [[one.masks[0], two.masks[0]] for one, two in zip(bold, safe, strict=True)]
    if stages == ["first"]:  # else the cautious point differs only in going on
        assert {row.masks[1] for row in dialled} == {0} != {row.masks[0] for row in dialled}
    dense = sd_gym.onnx.load(tmp_path / "onnx", max_loss=0.0)(texts)
    with (
        client_of(service(tmp_path / "onnx", Limits(rows=4), RequestLimits())) as client,
        ThreadPoolExecutor(6) as threads,
    ):
        came = list(threads.map(lambda text: served(client, "/predict", text), texts))
        assert client.get("/info").json()["switches"] == artefact.network.switches
        safe = client.post("/predict", json={"inputs": [[text] for text in texts], "max_loss": 0.0, "details": True})
    cautious = service(
        tmp_path / "onnx", Limits(), RequestLimits(), max_loss=0.0
    ).points  # 1000.1 is not one of float32
    assert (len(cautious.points), cautious.default, cautious.index(0.0, None), cautious.index(0.02, None)) == (
        2,
        1,
        1,
        0,
    )
    for answers, offline in ((came, wanted), (safe.json(), dense)):
        assert [one["answer"] for one in answers] == [one.answer for one in offline]
        np.testing.assert_array_equal([one["skip"] for one in answers], [one.skip for one in offline])
        assert [one["went_on"] for one in answers] == [one.went_on for one in offline]
        np.testing.assert_allclose([one["flops_ratio"] for one in answers], [one.flops_ratio for one in offline])
    assert next(iter(came[0]["scores"])) == came[0]["answer"]


def test_texts_of_a_generator_are_as_long_as_was_asked_for(tmp_path, tiny_tokenizer, monkeypatch):
    _, _, artefact, texts = trained("summarization", None, tmp_path, tiny_tokenizer)
    model, own = sd_gym.load(artefact), service(artefact, Limits(), RequestLimits())
    monkeypatch.setattr("sd_gym.serving.engine.WARM_UP_TOKENS", 2)
    with monkeypatch.context() as patch:
        answered, warm = own.engine._answered, []
        patch.setattr(own.engine, "_answered", lambda *given: warm.extend(answered(*given)))
        own.engine.warm_up()
    assert max(one.generated for one in warm) == 2
    with client_of(own) as client, ThreadPoolExecutor(4) as threads:

        def generate(numbered):
            text, longest = numbered
            body = {"inputs": text, "parameters": {"max_new_tokens": longest}}
            return client.post("/generate", json=body).json()["generated_text"]

        came = list(threads.map(generate, [(text, longest) for text in texts[:6] for longest in (1, 4)]))
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 404  # it has an encoder
    assert came[1::2] == [one.answer for one in model(texts[:6])]
    card = deepcopy(artefact.card)
    card["env"]["backbone"]["max_target_length"] = 1
    assert came[::2] == [one.answer for one in sd_gym.load(replace(artefact, card=card))(texts[:6])]


def test_a_server_of_short_inputs_starts(tmp_path, tiny_tokenizer):
    """Questions are never cut, so those of its warm-up are short."""
    _, _, artefact, texts = trained("extracted", None, tmp_path, tiny_tokenizer)
    card = deepcopy(artefact.card)
    card["env"]["backbone"]["max_source_length"] = 10
    with client_of(service(replace(artefact, card=card), Limits(), RequestLimits())) as client:
        question = {"question": "is it", "context": texts[0]["context"]}
        assert client.post("/predict", json={"inputs": question}).status_code == 200


def test_one_long_question_fails_alone(tmp_path, tiny_tokenizer):
    """Which is seen only when it is tokenised."""
    _, _, artefact, texts = trained("extracted", None, tmp_path, tiny_tokenizer)
    long = {"question": "the food " * 40, "context": "good"}
    own = service(artefact, Limits(), RequestLimits())
    with client_of(own) as client, ThreadPoolExecutor(6) as threads:
        responses = list(threads.map(lambda one: client.post("/predict", json={"inputs": one}), [*texts[:5], long]))
    assert [response.status_code for response in responses] == [200] * 5 + [422]
    assert responses[-1].json()["error"].startswith("the input: the question alone")
