"""Losses, against values worked out by hand."""

import pytest
import torch

from sd_gym.backbones.heads.losses import IGNORED, Losses


def test_only_labels_that_count_are_learned_from():
    half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    logits, dense = torch.stack([half, half])[None], torch.stack([quarter, quarter])[None].requires_grad_()
    labels = torch.tensor([[0, IGNORED]])
    losses = Losses()
    assert losses.loss(logits, labels).item() == pytest.approx(torch.tensor(2.0).log().item())
    divergence = 0.25 * torch.tensor(0.25 / 0.5).log() + 0.75 * torch.tensor(0.75 / 0.5).log()
    logits.requires_grad_()
    distillation = losses.distillation(logits, dense, labels)
    assert distillation.item() == pytest.approx(divergence.item())
    distillation.backward()
    assert dense.grad is None
    assert not logits.grad[0, 1].any()
