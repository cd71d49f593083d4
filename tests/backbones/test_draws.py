"""The random decisions that a backbone is prepared under."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from sd_gym.backbones.draws import (
    DRAWS,
    RANDOM_SHARE,
    decisions_around,
    layer_importance,
    layers_of,
    least_important,
)
from sd_gym.backbones.heads import head_of
from sd_gym.switch import Switchboard
from tests.conftest import make_inputs, make_last_token_classifier, make_model

ROWS = 4000
LAYERS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
IMPORTANCE = torch.tensor([3, 1, 0, 2])


def drawn(draw, rate=0.6, seed=0, rows=ROWS):
    return DRAWS[draw](rows, LAYERS, rate, torch.Generator().manual_seed(seed), IMPORTANCE)


def test_layers_are_numbered_through_all_stacks():
    board = Switchboard(make_model("bart"))
    layers = layers_of(board).tolist()
    assert layers == sorted(layers)
    places = [(switch.stack, switch.index) for switch in board.switches]
    assert len(set(layers)) == len(set(places)) == max(layers) + 1
    assert len(set(zip(layers, places, strict=True))) == len(set(places))


@pytest.mark.parametrize("draw", DRAWS)
@given(rate=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_they_are_skip_vectors_that_depend_on_the_seed_only(draw, rate, seed):
    skip = drawn(draw, rate, seed, rows=7)
    assert skip.shape == (7, len(LAYERS))
    assert skip.dtype == torch.int64
    assert set(skip.unique().tolist()) <= {0, 1}
    assert torch.equal(skip, drawn(draw, rate, seed, rows=7))


def test_even_skips_every_switch_alike():
    rates = drawn("even").float().mean(dim=0)
    assert torch.allclose(rates, torch.full_like(rates, 0.3), atol=0.03)


def test_deeper_skips_more_the_deeper_it_gets_and_as_much_in_all():
    rates = drawn("deeper").float().mean(dim=0)
    assert torch.allclose(rates, 0.3 * (2 * LAYERS + 1) / 4, atol=0.03)
    assert rates.mean().item() == pytest.approx(0.3, abs=0.02)


def test_staged_runs_layers_up_to_a_random_one_and_half_leave_there():
    skip = drawn("staged", rate=0.0).bool()
    assert not skip.any(dim=1).all()
    left = skip[skip.any(dim=1)]
    first = left.float().argmax(dim=1)  # nothing else is skipped, so a row skips all from its stage on
    assert (left == (torch.arange(len(LAYERS)) >= first[:, None])).all()
    assert (LAYERS[first].bincount() / len(skip)).tolist() == pytest.approx([0.1] * 4, abs=0.02)  # half of 1 in 5


@given(rate=st.floats(0, 1), bolder=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_layers_are_skipped_whole_and_more_of_them_at_a_higher_rate(rate, bolder, seed):
    skip = drawn("layers", rate, seed, rows=50)
    assert torch.equal(skip[:, ::2], skip[:, 1::2])
    counts = skip[:, ::2].sum(dim=1)
    assert counts.max() <= round(rate * 4)
    more = drawn("layers", max(rate, bolder), seed, rows=50)
    assert (skip <= more).all()


def test_the_least_important_layers_are_drawn_mostly():
    rates = drawn("layers", 0.5)[:, ::2].float().mean(dim=0)
    assert rates.argsort(descending=True).tolist() == IMPORTANCE.argsort().tolist()
    assert rates.min() > 0.1
    assert least_important(IMPORTANCE, 0.5, LAYERS).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def last_token_classifier():
    model, inputs = make_last_token_classifier("llama"), make_inputs("llama")
    model.config.pad_token_id = 1
    batch = {"labels": torch.zeros(5, dtype=torch.int64)}
    batch |= {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model, batch


def test_a_layer_that_does_nothing_is_skipped_first():
    model, batch = last_token_classifier()
    board = Switchboard(model.train())
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[1].get_submodule(name).weight.zero_()
    importance = layer_importance(board, batch, 0.6, Accelerator(cpu=True))
    assert importance[1] == 0
    assert sorted(importance.tolist()) == [0, 1, 2]
    assert model.training


def test_layers_are_skipped_in_the_order_of_what_they_lose_together():
    model, batch = last_token_classifier()
    board, head = Switchboard(model.eval()), head_of(model)
    layers, accelerator = layers_of(board), Accelerator(cpu=True)

    def loss(*skipped):
        skip = torch.isin(layers, torch.tensor(skipped)).long().expand(5, -1)
        with torch.inference_mode(), board.decide(skip):
            logits = head.forward(board, batch)
        with torch.inference_mode():
            return head.distillation(logits, head.forward(board, batch), batch["labels"]).item()

    with torch.no_grad():  # the first two layers undo each other
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            undone, undoing = (model.model.layers[layer].get_submodule(name).weight for layer in (0, 1))
            undoing.copy_(-undone)
    first, second, last = layer_importance(board, batch, 1.0, accelerator).argsort().tolist()
    others = {0, 1, 2} - {first}
    assert loss(first) == min(map(loss, range(3)))
    assert loss(first, second) == min(loss(first, other) for other in others)
    assert others == {second, last}


def test_decisions_around_a_policy_follow_it():
    logits = torch.tensor([[8.0, -8.0, 0.0]]).repeat(4000, 1)
    random = torch.ones(4000, 3, dtype=torch.int64)
    drawn = decisions_around(logits, random, torch.Generator().manual_seed(0))
    rates = drawn.double().mean(dim=0)
    # Rows that take the random decision skip all; the others skip with 0.98, 0.02, and in between.
    assert rates[0] == pytest.approx(RANDOM_SHARE + (1 - RANDOM_SHARE) * 0.98, abs=0.03)
    assert rates[1] == pytest.approx(RANDOM_SHARE + (1 - RANDOM_SHARE) * 0.02, abs=0.03)
    assert rates[1] < rates[2] < rates[0]
