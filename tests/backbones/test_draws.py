"""Which decisions a backbone meets while it is prepared."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_gym.backbones.draws import DRAWS, layers_of
from sd_gym.switch import Switchboard
from tests.conftest import make_model

ROWS = 4000
LAYERS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
IMPORTANCE = torch.tensor([0.9, 0.2, 0.1, 0.5])


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
def test_they_are_skip_vectors_that_a_seed_tells(draw, rate, seed):
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
    first = left.float().argmax(dim=1)  # where nothing else is skipped, a row that skips skips all behind its look
    assert (left == (torch.arange(len(LAYERS)) >= first[:, None])).all()
    assert (LAYERS[first].bincount() / len(skip)).tolist() == pytest.approx([0.1] * 4, abs=0.02)  # half of 1 in 5
