"""Qualities and metrics, against values worked out by hand."""

import numpy as np
import pytest
import torch

from sd_gym.backbones.heads import LabelHead, ScoreHead, Seq2SeqHead
from sd_gym.tasks.metrics import corpus_metric


def test_quality_of_classes_scores_and_texts():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    head = LabelHead({"bad": 0, "good": 1})
    assert head.prediction(logits).tolist() == [1, 0]
    assert head.exact(logits, torch.tensor([1, 1])).tolist() == [1.0, 0.0]
    scores = torch.tensor([[4.0], [0.5], [9.0]])
    assert ScoreHead({"score": 0}).exact(
        scores, torch.tensor([5.0, 0.5, 0.0]), label_range=5.0
    ).tolist() == pytest.approx([0.8, 1.0, 0.0])
    tokens = torch.nn.functional.one_hot(torch.tensor([[2, 1, 0], [2, 0, 0]]), 3).float()
    assert Seq2SeqHead().exact(tokens, torch.tensor([[2, 1, -100], [2, 1, 0]])).tolist() == [1.0, 0.0]


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
    with pytest.raises(ValueError, match="unknown metric 'bleu'"):
        corpus_metric("bleu", predicted, labels)
