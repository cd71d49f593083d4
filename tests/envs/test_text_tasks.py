"""The envs of texts, on local mirrors of a few instances in the form of the hub."""

import gymnasium as gym
import numpy as np
import pytest
from datasets import Dataset, Features, Sequence, Value
from gymnasium.utils.env_checker import check_env
from sd_gym.agents.experiment.evaluation import evaluate

from sd_gym.config import DataConfig
from sd_gym.errors import DataError
from sd_gym.tasks.data import load_split
from tests.conftest import WORDS, dense_policy, make_extractor, save, write_mirror

ANSWERS = Sequence({"text": Value("string"), "answer_start": Value("int32")})
ENVS = {
    "Summarization-CNNDailyMail": {"article": Value("string"), "highlights": Value("string"), "id": Value("string")},
    "Summarization-XSum": {"document": Value("string"), "summary": Value("string"), "id": Value("string")},
    "QuestionAnswering-SQuAD": {"question": Value("string"), "context": Value("string"), "answers": ANSWERS},
    "QuestionAnswering-SQuADv2": {"question": Value("string"), "context": Value("string"), "answers": ANSWERS},
}


def mirror(folder, features, subset="default", empty=False):
    """A data set of a few instances with these features."""
    random = np.random.default_rng(0)
    splits = {}
    for split, size in {"train": 30, "validation": 8, "test": 8}.items():
        rows = {name: [" ".join(random.choice(WORDS, 6)) for _ in range(size)] for name in features}
        if "answers" in features:
            rows["context"] = [f"good food {context}" for context in rows["context"]]
            one = {"text": ["good food", "food"], "answer_start": [0, 5]}
            none = {"text": [], "answer_start": []}
            rows["answers"] = [none if empty and number % 2 else one for number in range(size)]
        splits[split] = Dataset.from_dict(rows, features=Features(features))
    return write_mirror(folder, subset, splits)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("extractor")
    return save(make_extractor("bert"), tiny_tokenizer, folder)


@pytest.mark.parametrize("quality", ["likelihood", "metric"])
@pytest.mark.parametrize(
    ("name", "backbone"),
    [*((name, "generator") for name in ENVS), *((name, "extractor") for name in ENVS if name.startswith("Question"))],
)
def test_every_env_with_texts_runs(name, backbone, quality, tmp_path, request):
    backbone = request.getfixturevalue(backbone)
    subset = "3.0.0" if "CNN" in name else "default"
    data = mirror(tmp_path / "data", ENVS[name], subset, empty=name.endswith("v2"))
    splits = {"train": "train[:-10]", "validation": "train[-10:]", "test": "validation"}
    settings = {"dataset": data, "backbone": str(backbone), "splits": splits, "quality": quality}
    settings |= {"max_source_length": 24, "max_target_length": 6, "num_beams": 2}
    env = gym.make(f"SD/{name}-v0", **settings)
    check_env(env.unwrapped)
    core = env.unwrapped.core
    split, rows = core.split("test"), np.arange(8)
    decisions = np.zeros((8, len(core.nvec)), dtype=np.int64)
    outcome = core.score(split, rows, decisions)
    assert (outcome.quality == outcome.quality_ref).all()
    assert ((outcome.quality >= 0) & (outcome.quality <= 1)).all()
    decisions[::2, :-1:2] = 1
    together = core.score(split, rows, decisions).quality
    alone = [core.split("test").scoring.run(rows[i : i + 1], decisions[i : i + 1])[0] for i in range(8)]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    if name.endswith("v2"):
        assert split.instances[1].references == ()
    policy = dense_policy(f"SD/{name}-v0", **settings)
    metrics = evaluate(core, policy, "test")["metrics"]
    assert metrics["policy"] == metrics["dense"]
    assert set(metrics["dense"]) == ({"rouge1", "rouge2", "rougeL"} if "Summ" in name else {"exact_match", "f1"})


def test_likelihood_is_the_mean_probability_of_the_reference(tmp_path, generator):
    import torch

    data = mirror(tmp_path / "data", ENVS["Summarization-XSum"])
    settings = {"dataset": data, "backbone": str(generator), "max_target_length": 32}
    core = gym.make("SD/Summarization-XSum-v0", **settings).unwrapped.core
    split = core.split("test")
    inputs = split.passes.inputs(np.array([2]))
    with torch.inference_mode():
        loss = core.backbone.model(**inputs).loss  # Hugging Face's mean over the reference's tokens
    _, probability = split.scoring.quality_and_likelihood(np.array([2]), np.zeros((1, len(core.nvec)), dtype=np.int64))
    assert probability[0] == pytest.approx(float(torch.exp(-loss)), rel=1e-5)


def test_passes_are_bounded(tmp_path, generator, monkeypatch):
    data = mirror(tmp_path / "data", ENVS["Summarization-XSum"])
    settings = {"dataset": data, "backbone": str(generator), "max_target_length": 32}
    split = gym.make("SD/Summarization-XSum-v0", **settings).unwrapped.core.split("train")
    rows, decisions = np.arange(30), np.zeros((30, len(split.backbone.board) + 1), dtype=np.int64)
    whole = split.scoring.run(rows, decisions)
    monkeypatch.setattr("sd_gym.execution.passes.PASS_TOKENS", 50)  # three rows of 8 + 8 tokens
    assert [len(picked) for picked, _ in split.passes.planned(rows, decisions)] == [3] * 10
    np.testing.assert_allclose(split.scoring.run(rows, decisions), whole, rtol=1e-5)


def test_questions_without_answer_are_refused_where_there_are_none(tmp_path):
    data = mirror(tmp_path / "data", ENVS["QuestionAnswering-SQuAD"], empty=True)
    with pytest.raises(DataError, match="row 2: the question has no answer"):
        load_split(DataConfig(dataset=data, unanswerable=False), "question_answering", "train")
    (tmp_path / "qa.jsonl").write_text('{"question": "q", "context": "c", "answers": 3}\n')
    with pytest.raises(DataError, match="line 1: answers must be a text, a list of texts"):
        load_split(str(tmp_path / "qa.jsonl"), "question_answering", "train")
