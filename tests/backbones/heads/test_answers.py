"""Predictions and their qualities, against values worked out by hand."""

import pytest
import torch

from sd_gym.backbones.heads import LabelHead, ScoreHead, Seq2SeqHead


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


def test_dense_scores_cannot_be_the_right_ones():
    with pytest.raises(ValueError, match=r"policy_labels=dense: two scores are hardly ever equal"):
        ScoreHead({"score": 0}).measured_by("agreement")
