"""Training under skipping: what is learned from, which weights stay, and going on after an interruption."""

import numpy as np
import pytest
import torch

from sd_gym.backbones.heads import head_of
from sd_gym.backbones.prepare import Recipe, decisions_around, prepare, sandwich_loss
from sd_gym.switch import Switchboard
from tests.conftest import make_inputs, make_model


def count_steps(board, qualities, patience=None, **settings):
    """Steps of a preparation whose validations give these qualities, and the weights that it leaves."""
    batch = {**make_inputs("bert"), "labels": torch.tensor([0, 1, 0, 1, 0])}
    weights, remaining = [], iter(qualities)

    def validate(drawing):
        weights.append(board.model.classifier.weight.detach().clone())
        return next(remaining)

    recipe = Recipe(100, 1e-3, patience=patience)
    course = prepare(board, iter(lambda: batch, None), recipe, validate=validate, **settings)
    return course, weights


def test_the_best_weights_stay_and_patience_ends():
    board = Switchboard(make_model("bert"))
    course, weights = count_steps(board, [0.1, 0.5, 0.4, 0.5, 0.3, 0.9], patience=3)
    assert course.step == 50  # the best quality came after 20 steps, and did not come again in three validations
    assert course.validation == [(10, 0.1), (20, 0.5), (30, 0.4), (40, 0.5), (50, 0.3)]
    assert torch.equal(board.model.classifier.weight, weights[3])  # as good, and it learned longer
    assert not torch.equal(weights[3], weights[1])
    course, weights = count_steps(Switchboard(make_model("bert")), np.linspace(0, 1, 10))
    assert course.step == 100


def test_patience_and_the_best_weights_survive_an_interruption(tmp_path):
    class CutError(Exception):
        pass

    def cut(step, figures):
        if step == 35:
            raise CutError

    whole, cut_off = Switchboard(make_model("bert")), Switchboard(make_model("bert"))
    qualities = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9]
    count_steps(whole, qualities, patience=3)
    settings = {"patience": 3, "checkpoint": tmp_path / "checkpoint.pt", "checkpoint_minutes": 0}
    with pytest.raises(CutError):
        count_steps(cut_off, qualities, **settings, on_step=cut)
    again = Switchboard(make_model("bert"))
    course, _ = count_steps(again, qualities[3:], **settings, resume=True)
    assert [quality for _, quality in course.validation] == qualities[:5]
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_dropped_token_is_not_seen_by_the_switched_half_only():
    board, inputs = Switchboard(make_model("bert")), make_inputs("bert")
    batch = {**inputs, "labels": torch.tensor([0, 1, 0, 1, 0]), "keep": inputs["attention_mask"].bool()}
    batch["keep"][0, 3] = False
    skip = torch.zeros(5, len(board), dtype=torch.int64)
    with torch.inference_mode():
        head = head_of(board.model)
        loss, distillation = sandwich_loss(board, batch, skip)
        dense = board.model(**inputs).logits
        with board.decide(skip, batch["keep"]):
            dropped = board.model(**inputs).logits
    assert loss.item() == pytest.approx(head.loss(dense, batch["labels"]).item(), rel=1e-5)
    assert distillation.item() == pytest.approx(head.distillation(dropped, dense, batch["labels"]).item(), rel=1e-4)
    assert distillation.item() > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_decisions_around_a_policy_follow_it(share):
    logits = torch.tensor([[8.0, -8.0, 0.0]]).repeat(4000, 1)
    random = torch.ones(4000, 3, dtype=torch.int64)
    drawn = decisions_around(logits, random, torch.Generator().manual_seed(0), share)
    rates = drawn.double().mean(dim=0)
    # Rows that take the random decision skip all; the others skip with 0.98, 0.02, and in between.
    assert rates[0] == pytest.approx(share + (1 - share) * 0.98, abs=0.03)
    assert rates[1] == pytest.approx(share + (1 - share) * 0.02, abs=0.03)
    assert rates[1] < rates[2] < rates[0]


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.0, False)])
def test_a_policy_decides_on_the_rows_that_are_not_random(share, same):
    def distillations(log_odds):
        board = Switchboard(make_model("bert"))
        logits = torch.full((5, len(board)), log_odds)
        batch = {**make_inputs("bert"), "labels": torch.tensor([0, 1, 0, 1, 0]), "skip_logits": logits}
        seen = []

        def on_step(step, figures):
            seen.append(figures["distillation"])

        recipe = Recipe(3, 1e-3, random_share=share, max_rate=0.8)
        prepare(board, iter(lambda: dict(batch), None), recipe, on_step=on_step)
        return seen

    assert (distillations(-9.0) == distillations(9.0)) is same
