"""Training under skipping: the loss, the weights that are kept, and resuming."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForQuestionAnswering

from sd_gym.backbones import draws
from sd_gym.backbones.heads import head_of
from sd_gym.backbones.prepare import Recipe, prepare, sandwich_loss
from sd_gym.switch import Switchboard
from tests.conftest import CutError, make_inputs, make_model


def count_steps(board, qualities, patience=None, draw="even", **settings):
    """Steps of a preparation whose validations give these qualities, and the weights that it leaves."""
    batch = {**make_inputs("bert"), "labels": torch.tensor([0, 1, 0, 1, 0])}
    weights, remaining = [], iter(qualities)

    def validate(drawing):
        weights.append(board.model.classifier.weight.detach().clone())
        return next(remaining)

    recipe = Recipe(40, 1e-3, patience=patience, draw=draw)
    course = prepare(board, iter(lambda: batch, None), recipe, validate=validate, **settings)
    return course, weights


def test_the_best_weights_stay_and_patience_ends():
    board = Switchboard(make_model("bert"))
    course, weights = count_steps(board, [0.1, 0.5, 0.4, 0.5, 0.3, 0.9], patience=3)
    assert course.step == 20  # the best quality came after 8 steps, and no better one in three validations
    assert course.validation == [(4, 0.1), (8, 0.5), (12, 0.4), (16, 0.5), (20, 0.3)]
    assert torch.equal(board.model.classifier.weight, weights[3])  # as good, and it learned longer
    assert not torch.equal(weights[3], weights[1])
    course, weights = count_steps(Switchboard(make_model("bert")), np.linspace(0, 1, 10))
    assert course.step == 40


@pytest.mark.parametrize("draw", ["even", "layers"])
def test_patience_and_the_best_weights_survive_an_interruption(draw, tmp_path):
    def cut(step, figures):
        if step == 14:
            raise CutError

    whole, cut_off = Switchboard(make_model("bert")), Switchboard(make_model("bert"))
    qualities = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9]
    course, _ = count_steps(whole, qualities, patience=3, draw=draw)
    settings = {"patience": 3, "draw": draw, "checkpoint": tmp_path / "checkpoint.pt", "checkpoint_minutes": 0}
    with pytest.raises(CutError):
        count_steps(cut_off, qualities, **settings, on_step=cut)
    again = Switchboard(make_model("bert"))
    resumed, _ = count_steps(again, qualities[3:], **settings, resume=True)
    assert [quality for _, quality in resumed.validation] == qualities[:5]
    assert (resumed.importance is None) is (draw == "even")
    assert draw == "even" or torch.equal(resumed.importance, course.importance)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_dropped_token_is_hidden_from_the_switched_half_only():
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


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.0, False)])
def test_a_policy_decides_on_the_rows_that_are_not_random(share, same, monkeypatch):
    monkeypatch.setattr(draws, "RANDOM_SHARE", share)

    def distillations(log_odds):
        board = Switchboard(make_model("bert"))
        logits = torch.full((5, len(board)), log_odds)
        batch = {**make_inputs("bert"), "labels": torch.tensor([0, 1, 0, 1, 0]), "skip_logits": logits}
        losses = []

        def on_step(step, figures):
            losses.append(figures["distillation"])

        recipe = Recipe(3, 1e-3, max_rate=0.8)
        prepare(board, iter(lambda: dict(batch), None), recipe, on_step=on_step)
        return losses

    assert (distillations(-9.0) == distillations(9.0)) is same


LABELS = {
    "bert": torch.tensor([0, 1, 0, 1, 0]),
    "span": torch.tensor([[[-1, -1]], [[1, 2]], [[-1, -1]], [[2, 3]], [[-1, -1]]]),  # most answers were cut off
    "bart": torch.tensor([[4, 5, 6, 7, 2], [5, 2, -100, -100, -100]] * 2 + [[2, -100, -100, -100, -100]]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_batch_in_parts_teaches_the_same(kind):
    def weights(parts):
        name = "bart" if kind == "bart" else "bert"
        model = make_model(name)
        if kind == "span":
            torch.manual_seed(0)
            model = BertForQuestionAnswering(model.config).eval()
        board = Switchboard(model)
        for module in board.model.modules():
            module.p = 0.0  # of dropout
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        inputs = {key: make_inputs(name)[key] for key in ("input_ids", "attention_mask")}
        more = {"context_mask": inputs["attention_mask"].bool()} if kind == "span" else {}
        batch, figures = {**inputs, **more, "labels": LABELS[kind]}, []
        recipe = Recipe(3, 1e-3, accumulate=parts)
        prepare(board, iter(lambda: batch, None), recipe, on_step=lambda step, shown: figures.append(shown))
        return next(iter(board.model.parameters())).detach(), figures

    (whole, figures), (parts, others) = weights(1), weights(3)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=3e-4)  # AdamW follows signs of gradients near 0
    for key in ("loss", "distillation"):
        assert [one[key] for one in others] == pytest.approx([one[key] for one in figures], rel=1e-4, abs=1e-6)


def test_checkpoints_are_written_by_the_clock(tmp_path):
    board = Switchboard(make_model("bert"))
    count_steps(board, np.linspace(0, 1, 10), checkpoint=tmp_path / "checkpoint.pt", checkpoint_minutes=60)
    assert not (tmp_path / "checkpoint.pt").exists()


@given(steps=st.integers(1, 500), max_rate=st.floats(0, 1))
def test_the_rate_of_whole_layers_rises_to_the_highest(steps, max_rate):
    recipe = Recipe(steps, max_rate=max_rate, draw="layers")
    rates = [recipe.max_rate_at(step) for step in range(1, steps + 1)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(max_rate)
    assert Recipe(steps, max_rate=max_rate).max_rate_at(1) == max_rate


@pytest.mark.parametrize("steps", [1, 9, 10, 19, 21])
def test_validations_are_ten_at_most(steps):
    board, validated = Switchboard(make_model("bert")), []
    batch = {**make_inputs("bert"), "labels": torch.tensor([0, 1, 0, 1, 0])}

    def validate(draw):
        validated.append(draw)
        return 1.0

    prepare(board, iter(lambda: dict(batch), None), Recipe(steps, 1e-3), validate=validate)
    assert 1 <= len(validated) <= 10
