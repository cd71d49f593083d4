"""Qualities and metrics, against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import squad

import sd_gym
from sd_gym.tasks.metrics import answer_scores, corpus_metric, normalised, summary_scores, text_metrics, text_quality

PIECES = st.sampled_from(["the ", "a ", "An ", "dog ", "Cat", ".", "'s ", "-", "1 ", " "])
TEXTS = st.lists(PIECES, max_size=8).map("".join)


def test_corpus_metrics():
    labels, predicted = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    assert corpus_metric("accuracy", predicted, labels) == pytest.approx(4 / 6)
    # Two true positives, one false positive, one false negative.
    assert corpus_metric("f1", predicted, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)) = (4 - 1) / 9
    assert corpus_metric("matthews", predicted, labels) == pytest.approx(3 / 9)
    # By hand: Pearson of (0, 1, 2) and (0, 1, 5) is 5 / sqrt(2 * 14); the ranks agree, so Spearman's is 1.
    scores = corpus_metric("correlation", np.array([0.0, 1.0, 5.0]), np.array([0.0, 1.0, 2.0]))
    assert scores == pytest.approx((5 / np.sqrt(2 * 14) + 1) / 2)
    assert corpus_metric("correlation", np.zeros(3), np.arange(3.0)) == 0.0
    assert corpus_metric("correlation", np.arange(3.0), np.zeros(3)) == 0.0
    # Of class 1 among three: one true positive, one false positive, no false negative.
    assert corpus_metric("f1", np.array([1, 1, 2]), np.array([1, 0, 2])) == pytest.approx(2 * 1 / (2 * 1 + 1 + 0))
    with pytest.raises(ValueError, match="unknown metric 'bleu'"):
        corpus_metric("bleu", predicted, labels)


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
    assert answer_scores("", ["a cat", "the"]) == {"exact_match": 0.0, "f1": 0.0}
    assert answer_scores("", ["the"]) == {"exact_match": 1.0, "f1": 1.0}


@settings(deadline=None)
@given(answer=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
def test_squads_scores_are_those_of_torchmetrics(answer, references):
    target = {"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "1"}
    expected = squad([{"prediction_text": answer, "id": "1"}], [target])
    scores = answer_scores(answer, references)
    # With nothing left to compare, SQuAD 2.0's rules apply here, not SQuAD 1.1's.
    if all(normalised(reference) for reference in references):
        assert 100 * scores["exact_match"] == pytest.approx(expected["exact_match"].item())
    if normalised(answer) and all(normalised(reference) for reference in references):
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


@pytest.mark.usefixtures("own_names")
def test_a_metric_of_texts_has_its_mean_and_several_scores_by_name():
    sd_gym.register_metric("letters", of_text=lambda text, references: {"a": text.count("a") / 2, "b": 0.0})
    assert text_metrics("letters", ["aa", "b"], [["x"], ["y"]]) == {"a": 0.5, "b": 0.0}
    assert text_quality("letters", "aa", ["x"]) == 0.5
    with pytest.raises(ValueError, match="'letters' compares texts"):
        corpus_metric("letters", np.zeros(2), np.zeros(2))


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize("given", [57.0, -0.5, np.nan, "x", None, {}, {"a": 1.0, "b": 57}, {"a": None}, [0.5, 0.5]])
def test_a_metric_that_gives_no_score_between_0_and_1_is_told(given):
    sd_gym.register_metric("own", of_text=lambda text, references: given)
    for function, of in ((text_quality, ["a", ["b"]]), (text_metrics, [["a"], [["b"]]])):
        with pytest.raises(
            ValueError, match=r"the metric 'own' has to give a score in \[0, 1\], .*, got .* for the text"
        ):
            function("own", *of)


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize("given", [np.float32(1), np.bool_(True), 1, 100.00000000000004 / 100, {"own": np.int64(1)}])
def test_any_kind_of_number_is_a_score(given):
    sd_gym.register_metric("own", of_text=lambda text, references: given)
    assert text_metrics("own", ["a"], [["b"]]) == {"own": 1.0}
