"""Metrics of texts, by hand and against the reference; and the envs that use them, on mirrors of the hub's data."""

import gymnasium as gym
import numpy as np
import pytest
from datasets import Dataset, Features, Sequence, Value
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sd_gym.agents.experiment.evaluation import evaluate
from torchmetrics.functional.text import squad

from sd_gym.config import DataConfig
from sd_gym.envs import ConfigError
from sd_gym.tasks.data import DataError, load_split
from sd_gym.tasks.metrics import answer_scores, normalised, summary_scores, text_metrics, text_quality
from tests.conftest import WORDS, dense_policy, make_extractor, make_model, write_mirror


def test_squads_normalisation():
    assert normalised("  The Cat's, a   HAT! ") == "cats hat"
    assert normalised("anna") == "anna"  # an article is a word of its own


def test_squads_scores_by_hand():
    assert answer_scores("the Eiffel Tower", ["Eiffel tower", "tower"]) == {"exact_match": 1.0, "f1": 1.0}
    # Two of three answer tokens, two of four reference tokens: 2 * 2 / (3 + 4).
    scores = answer_scores("big red dog", ["red dog eats fish"])
    assert scores == {"exact_match": 0.0, "f1": pytest.approx(4 / 7)}
    assert answer_scores("", [])["f1"] == 1.0
    assert answer_scores("something", []) == {"exact_match": 0.0, "f1": 0.0}
    assert answer_scores("", ["yes"])["f1"] == 0.0


PIECES = st.sampled_from(["the ", "a ", "An ", "dog ", "Cat", ".", "'s ", "-", "1 ", " "])
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@settings(deadline=None)
@given(answer=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
def test_squads_scores_are_those_of_torchmetrics(answer, references):
    target = {"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "1"}
    expected = squad([{"prediction_text": answer, "id": "1"}], [target])
    scores = answer_scores(answer, references)
    assert 100 * scores["exact_match"] == pytest.approx(expected["exact_match"].item())
    if normalised(answer) and all(normalised(reference) for reference in references):
        # With nothing left to compare, SQuAD 2.0's rule applies here (no answer is right or wrong), not SQuAD 1.1's.
        assert 100 * scores["f1"] == pytest.approx(expected["f1"].item(), rel=1e-5)


def test_rouge_by_hand_and_against_the_reference():
    summary, reference = "the cat sat", "the cat was sitting on the mat"
    scores = summary_scores(summary, [reference])
    # Unigrams: 2 of 3 and of 7 (stemming: sat is not sit). Bigrams: 1 of 2 and of 6. Longest common subsequence: 2.
    assert scores["rouge1"] == pytest.approx(2 * 2 / (3 + 7))
    assert scores["rouge2"] == pytest.approx(2 * 1 / (2 + 6))
    assert scores["rougeL"] == pytest.approx(2 * 2 / (3 + 7))
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, summary)
    assert scores == {name: score.fmeasure for name, score in expected.items()}
    assert summary_scores("dogs running", ["dog runs"])["rouge1"] == 1.0


def test_quality_and_metrics_of_texts():
    assert text_quality("squad", "red dog", ["red cat"]) == pytest.approx(0.5)
    assert text_quality("rouge", "red dog", ["red dog"]) == pytest.approx(1.0)
    assert text_metrics("squad", ["a", "dog"], [(), ("dog",)]) == {"exact_match": 1.0, "f1": 1.0}
    with pytest.raises(ValueError, match="unknown metric 'bleu'"):
        text_quality("bleu", "a", ["a"])


@pytest.fixture(scope="module")
def generator(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("generator")
    make_model("bart").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


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
    make_extractor("bert").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


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
    with pytest.raises(DataError, match="line 1: answers must be a list of texts"):
        load_split(str(tmp_path / "qa.jsonl"), "question_answering", "train")


def test_quality_by_metric_needs_a_metric_of_texts(generator, tmp_path):
    with pytest.raises(ConfigError, match=r"config key 'quality.kind': 'metric' scores texts"):
        gym.make("SD/Summarization-Custom-v0", dataset="x.jsonl", backbone=str(generator), quality="metric")


def test_a_metric_of_another_task_is_refused(generator):
    with pytest.raises(
        ConfigError, match=r"'quality\.metric': summarization is measured by rouge, exact_match; got 'squad'"
    ):
        gym.make("SD/Summarization-Custom-v0", dataset="x.jsonl", backbone=str(generator), metric="squad")
