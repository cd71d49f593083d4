"""A policy that leaves its env: on raw texts, without the data, it decides and answers just as it did there."""

import copy
import itertools
import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.experiment.export import export
from sd_gym.agents.experiment.run import run_metadata
from sd_gym.agents.learning.decisions import decision_flops
from transformers import AutoModelForSequenceClassification

import sd_gym
from sd_gym.envs.spaces import flat_size
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.card import write_card
from sd_gym.policy.protected_tokens import ProtectedTokens
from tests.conftest import WORDS, make_extractor, make_model

RESULT = {
    "split": "test",
    "instances": 24,
    "quality": 0.9,
    "quality_ref": 0.95,
    "flops_ratio": 0.4,
    "flops_ratio_with_policy": 0.41,
    "quality_difference": -0.05,
    "quality_difference_interval": [-0.1, 0.0],
    "verdict": "too few instances to tell",
}
PROMPT = "the {source} room {source_pair} food"


def words(random, low=3, high=12):
    return " ".join(random.choice(WORDS, random.integers(low, high)))


def row(random, task):
    if task == "classification":
        return {"text": words(random), "label": int(random.integers(2))}
    if task == "pairs":
        return {"text": words(random), "text_pair": words(random), "label": int(random.integers(2))}
    if task == "scores":
        return {"text": words(random), "label": float(random.random())}
    if task == "summarization":
        return {"document": words(random), "summary": words(random, 1, 4)}
    context = words(random)
    return {"question": words(random, 2, 4), "context": context, "answers": [context.split()[1]]}


def texts_of(task, one):
    if task == "pairs":
        return one["text"], one["text_pair"]
    if task in ("extracted", "prompted", "answered"):
        return {"question": one["question"], "context": one["context"]}
    return one.get("text") or one["document"]


MODELS = {
    "classification": (lambda: make_model("roberta"), "SD/Classification-Custom-v0"),
    "pairs": (lambda: make_model("bert"), "SD/Classification-Custom-v0"),
    "scores": (lambda: regressor(), "SD/Classification-Custom-v0"),
    "summarization": (lambda: make_model("bart"), "SD/Summarization-Custom-v0"),
    "answered": (lambda: make_model("t5"), "SD/QuestionAnswering-Custom-v0"),
    "extracted": (lambda: make_extractor("bert"), "SD/QuestionAnswering-Custom-v0"),
    "prompted": (lambda: make_model("llama"), "SD/QuestionAnswering-Custom-v0"),
}


def regressor():
    config = make_model("bert").config
    config.num_labels = 1
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(params=list(MODELS))
def task(request):
    return request.param


@pytest.fixture(params=[None, "idf", "attention", "position"])
def ranking(request):
    return request.param


def trained(task, ranking, folder, tokenizer, observation="pooled", stages=("first",)):
    """An env, a policy of it that decides differently on every input, and the artefact's folder."""
    random = np.random.default_rng(0)
    rows = {split: [row(random, task) for _ in range(24)] for split in ("train", "validation", "test")}
    data = folder / "data"
    data.mkdir()
    for split, lines in rows.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    make, env_id = MODELS[task]
    make().save_pretrained(folder / "backbone")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "backbone")
    settings = {"dataset": str(data), "backbone": str(folder / "backbone"), "max_target_length": 4, "splits": {}}
    settings |= {"max_source_length": 26, "overlap": "allow", "observation": observation, "stages": list(stages)}
    settings |= {"prompt": PROMPT} if task == "prompted" else {}
    settings |= {"token_shares": [0.0, 0.4], "token_ranking": ranking} if ranking else {}
    core = gym.make_vec(env_id, num_envs=1, **settings).unwrapped.core
    torch.manual_seed(1)
    flat, tokens = flat_size(core.observation_space), observation == "tokens"
    encoder = {"channels": 5 if tokens else None, "token_width": 16 if tokens and flat else None}
    known = core.nvec.tolist(), core.backbone.board.names
    policy = DecisionPolicy(flat or 16, *known, **encoder, stages=core.stages).eval()
    with torch.no_grad():
        policy.head.weight.mul_(20)
    description = {**run_metadata(core.config), "env": env_id, "algo": "ppo", "steps": 1, "seed": 0, "data": {}}
    artefact = export(core, policy, (), RESULT, json.loads(json.dumps(description, default=str)))
    artefact.save_pretrained(folder / "artefact")
    return core, policy, artefact, [texts_of(task, one) for one in rows["test"]]


def test_on_raw_texts_it_decides_and_answers_as_in_the_env(task, ranking, tmp_path, tiny_tokenizer):
    decides_and_answers_the_same(task, ranking, tmp_path, tiny_tokenizer, "pooled")


@pytest.mark.parametrize("kind", [*itertools.product(MODELS, (None, "idf")), ("classification", "attention")], ids=str)
def test_so_does_a_policy_that_sees_tokens(kind, tmp_path, tiny_tokenizer):
    decides_and_answers_the_same(*kind, tmp_path, tiny_tokenizer, "tokens")


STAGED = [
    ("classification", None, ["first", "encoder.1"]),
    ("classification", "attention", ["every_layer"]),
    ("classification", "idf", ["encoder.1"]),
    ("pairs", "position", ["first", "encoder.1"]),
    ("scores", None, ["first", "encoder.1"]),
    ("extracted", None, ["every_layer"]),
    ("summarization", None, ["first", "decoder"]),
    ("summarization", "idf", ["first", "encoder.1", "decoder", "decoder.1"]),
    ("answered", "attention", ["first", "decoder"]),
    ("prompted", "idf", ["every_layer"]),
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
    assert len(np.unique(decisions, axis=0)) > 1
    answers = split.passes.answers(every, decisions)
    model = sd_gym.load(folder / "artefact")
    try:
        came = model(texts)
        np.testing.assert_array_equal([one.skip for one in came], decisions[:, :-1])
        np.testing.assert_array_equal([one.token_level for one in came], decisions[:, -1])
        assert [one.answer for one in came] == answers
        assert [one.answer for one in model(texts, dense=True)] == split.passes.answers(every, 0 * decisions)
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
            call(**inputs, **({"max_new_tokens": 2} if split.head.gives == "text" else {}))
            np.testing.assert_array_equal(model.model.decisions.skip, decisions[:, :-1])
        assert tells or task in ("answered", "prompted")
    finally:
        sd_gym.detach(model.model)


def test_in_a_fresh_process_without_the_data_it_decides_the_same(tmp_path, tiny_tokenizer, reviews, tiny_backbone):
    data = tmp_path / "reviews" / "reviews.jsonl"
    data.parent.mkdir()
    reviews.rename(data)
    settings = {"dataset": str(data), "backbone": str(tiny_backbone), "overlap": "allow", "epsilon": 1.0}
    run = tmp_path / "run"
    sd_gym.train("SD/Classification-Custom-v0", "ppo", run, steps=600, strictness=0, **settings)
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
    assert "Verdict, where 100 points may be lost" in card
    assert "base_model" not in card  # a folder of this machine means nothing elsewhere
    policy = sd_gym.SkipPolicy.from_pretrained(run)
    assert policy.operating_points
    assert policy.at(max_flops=1.0) is not None


def test_what_is_no_artefact_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(FileNotFoundError, match="expected one with skip_policy"):
        sd_gym.SkipPolicy.from_pretrained(tmp_path / "nowhere")
    *_, artefact, _ = trained("classification", "idf", tmp_path, tiny_tokenizer)
    folder = tmp_path / "artefact"
    card = json.loads((folder / "skip_policy.json").read_text())
    del card["files"], card["format"]
    for change, message in (
        ({"operating_points": [{"margin": 0}]}, r"skip_policy\.json: not the card of a policy.*: operating_points.0"),
        ({"protection": {"special": [1]}}, r"skip_policy\.json: not the card of a policy.*: protection.first"),
        ({"env": {**card["env"], "tokens": {"shares": [0.0], "ranking": "idf"}}}, "2 token levels"),
    ):
        write_card(folder, {**card, **change})
        with pytest.raises(ValueError, match=message):
            sd_gym.SkipPolicy.from_pretrained(folder)
    artefact.save_pretrained(folder)
    model = sd_gym.load(folder)
    with pytest.raises(ValueError, match="put it in a list"):
        model("good food")
    with pytest.raises(ValueError, match="input 1: expected text and text_pair"):
        model(["good food", 3])
    assert model([]) == []
    sd_gym.detach(model.model)


def test_who_loads_owns_its_model(tmp_path, tiny_tokenizer):
    """Neither another load nor an env of the process runs under a policy that was loaded."""
    core, _, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer)
    every, split = np.arange(24), core.split("test")
    model = core.backbone.model
    before = model(**split.encoded.inputs(every, model.device)).logits
    first, second = sd_gym.load(artefact), sd_gym.load(artefact.with_margin(-3.0))
    alone = [one.skip for one in first(texts)]
    assert sum(map(sum, alone)) < sum(sum(one.skip) for one in second(texts))
    inputs = {name: split.passes.inputs(every)[name] for name in ("input_ids", "attention_mask")}
    first.model(**inputs)
    np.testing.assert_array_equal(first.model.decisions.skip, alone)
    assert torch.equal(model(**split.encoded.inputs(every, model.device)).logits, before)
    sd_gym.detach(first.model)
    sd_gym.detach(second.model)  # which has a policy of its own


def test_a_rule_for_protected_tokens_is_taken_only_if_it_says_just_the_same():
    ids = torch.tensor([[1, 7, 8, 2, 9, 9, 2], [1, 7, 2, 9, 2, 0, 0]])
    length = np.array([7, 5])
    question = np.array([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], dtype=bool)
    rule = ProtectedTokens.find(ids, length, question, [0, 1, 2], 2)
    assert rule.separator == 2
    first = np.array([[0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], dtype=bool)
    assert ProtectedTokens.find(ids, length, first, [0, 1, 2], 2) == ProtectedTokens((0, 1, 2), 2, 1, None)
    assert ProtectedTokens.find(ids, length, first[::-1].copy(), [0, 1, 2], 2) is None
