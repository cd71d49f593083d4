"""A policy that leaves its env: on raw texts, without the data, it decides and answers just as it did there."""

import itertools
import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.learning.decisions import decision_flops

import sd_gym
from sd_gym.going_on import answer_masks, masks_and_goes_on
from sd_gym.policy import DecisionPolicy
from tests.envs.conftest import MODELS, trained


@pytest.fixture(params=list(MODELS))
def task(request):
    return request.param


@pytest.fixture(params=[None, "idf", "attention", "position"])
def ranking(request):
    return request.param


def test_on_raw_texts_it_decides_and_answers_as_in_the_env(task, ranking, tmp_path, tiny_tokenizer):
    decides_and_answers_the_same(task, ranking, tmp_path, tiny_tokenizer, "pooled")


@pytest.mark.parametrize("kind", [*itertools.product(MODELS, (None, "idf")), ("classification", "attention")], ids=str)
def test_so_does_a_policy_that_sees_tokens(kind, tmp_path, tiny_tokenizer):
    decides_and_answers_the_same(*kind, tmp_path, tiny_tokenizer, "tokens")


STAGED = [
    ("classification", None, ["first", "encoder.1"]),
    ("classification", None, ["first", "answer"]),
    ("classification", "attention", ["every_layer"]),
    ("classification", "idf", ["encoder.1"]),
    ("pairs", "position", ["first", "encoder.1", "answer"]),
    ("scores", None, ["first", "encoder.1"]),
    ("extracted", None, ["every_layer"]),
    ("extracted", "position", ["first", "encoder.2", "answer"]),
    ("summarization", None, ["first", "answer"]),
    ("summarization", "idf", ["first", "encoder.1", "decoder", "decoder.1"]),
    ("answered", "attention", ["first", "decoder", "answer"]),
    ("prompted", "idf", ["every_layer"]),
    ("last token", "idf", ["first", "decoder.1"]),
    ("prompted", None, ["first", "answer"]),
]


@pytest.mark.parametrize("observation", ["pooled", "tokens"])
@pytest.mark.parametrize("kind", STAGED, ids=str)
def test_so_does_a_policy_that_decides_in_stages(kind, observation, tmp_path, tiny_tokenizer):
    task, ranking, stages = kind
    if observation == "tokens" and stages == ["encoder.1"]:
        stages = ["first", *stages]
    decides_and_answers_the_same(task, ranking, tmp_path, tiny_tokenizer, observation, stages)


def decides_and_answers_the_same(task, ranking, folder, tokenizer, observation, stages=("first",)):
    core, policy, artefact, texts = trained(task, ranking, folder, tokenizer, observation, stages)
    split, every = core.split("test"), np.arange(24)
    decisions = core.rollout(split, every, policy.decide)[0]
    masks, went_on = masks_and_goes_on(decisions, len(core.mask_nvec))
    assert len(np.unique(decisions, axis=0)) > 1
    assert went_on.any() == ("answer" in stages)
    answers = split.passes.answers(every, answer_masks(decisions, len(core.mask_nvec)))
    model = sd_gym.load(folder / "artefact")
    try:
        came = model(texts)
        np.testing.assert_array_equal([one.skip for one in came], masks[:, :-1])
        np.testing.assert_array_equal([one.token_level for one in came], masks[:, -1])
        np.testing.assert_array_equal([one.went_on for one in came], went_on)
        assert [one.answer for one in came] == answers
        assert [one.answer for one in model(texts, dense=True)] == split.passes.answers(every, 0 * masks)
        if split.head.gives != "text":  # there the env counts the right answer's length
            own = decision_flops(core, policy, split, every)
            ratio = split.costs.flops_ratio(every, decisions) + own / split.costs.dense_flops(every)
            np.testing.assert_allclose([one.flops_ratio for one in came], ratio)
        # Inside the model itself, on the env's own inputs.
        inputs = split.passes.inputs(every)
        wanted = {"input_ids", "attention_mask", "token_type_ids"} & inputs.keys()
        inputs = {name: inputs[name] for name in wanted}
        tells = ranking is None or artefact.protection is not None
        if tells:
            call = model.model.generate if split.head.gives == "text" else model.model
            tokens = 4 if "answer" in stages else 2  # as in the env, where the text is looked at
            call(**inputs, **({"max_new_tokens": tokens} if split.head.gives == "text" else {}))
            np.testing.assert_array_equal(model.model.decisions.skip, masks[:, :-1])
            np.testing.assert_array_equal(model.model.decisions.went_on, went_on)
            if split.head.gives != "text":
                ratio = split.costs.flops_ratio(every, decisions)
                np.testing.assert_allclose(model.model.decisions.flops_ratio, ratio)
        assert tells or task in ("answered", "prompted")
    finally:
        sd_gym.detach(model.model)


def test_unknown_words_are_dropped_inside_the_model_as_in_the_env(tmp_path, tiny_tokenizer):
    """Words of the training data are all known."""
    _, _, artefact, texts = trained("classification", "position", tmp_path, tiny_tokenizer)
    assert artefact.protection is not None
    model = sd_gym.load(tmp_path / "artefact")
    split = model.split([[f"{text} strange strange strange"] for text in texts])
    rows = np.arange(len(texts))
    most = np.full(len(texts), len(artefact.token_shares) - 1)
    inputs = split.passes.inputs(rows)
    kept = artefact.kept(model.board, {name: inputs[name] for name in ("input_ids", "attention_mask")}, most)
    assert kept is not None
    of_texts = kept & inputs["attention_mask"].bool()  # padding counts as kept
    np.testing.assert_array_equal(of_texts.sum(dim=1).numpy(), split.tokens.kept_length(rows, most))


def test_in_a_fresh_process_without_the_data_it_decides_the_same(tmp_path, reviews, tiny_backbone):
    data = tmp_path / "reviews" / "reviews.jsonl"
    data.parent.mkdir()
    reviews.rename(data)
    settings = {"dataset": str(data), "backbone": str(tiny_backbone), "overlap": "allow", "epsilon": 1.0}
    run = tmp_path / "run"
    sd_gym.train("SD/Classification-Custom-v0", "ppo", run, steps=600, confidence=0.5, **settings)
    core = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped.core
    split = core.split("test")
    rows = np.arange(len(split))
    decisions = DecisionPolicy.load(run).decide(core.observe(split, rows))
    texts = [one.source for one in split.instances]
    data.unlink()
    code = (
        "import json, sys, sd_gym; model = sd_gym.load(sys.argv[1]); "
        "print(json.dumps([[*map(int, one.skip), one.token_level] for one in model(json.loads(sys.argv[2]))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), json.dumps(texts)], capture_output=True, text=True, check=True
    )
    np.testing.assert_array_equal(json.loads(done.stdout), decisions)
    card = (run / "README.md").read_text()
    assert "A skipping policy for" in card
    assert "Verdict at epsilon 1: " in card
    assert "base_model" not in card  # a folder of this machine means nothing elsewhere
    policy = sd_gym.SkipPolicy.from_pretrained(run)
    assert policy.operating_points
    assert policy.at(max_flops=1.0) is not None
