"""What imitation learns at stages: the parts of a path, what is to come, and the price up to which a step pays."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_gym.agents.imitation.backward_induction import (
    ANSWERS,
    best,
    costs,
    earlier_decisions,
    price_logits,
    stage_choices,
)

LOG_PRICES = torch.linspace(-2, 4, 25)


@pytest.fixture
def core(reviews, tiny_backbone):
    files = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    keys = {"stages": ["first", "encoder.1"], "token_shares": [0, 0.5]}
    return gym.make("SD/Classification-Custom-Staged-v0", **files, **keys).unwrapped.core


def path_of(core, seed=0):
    """A random path from dense to nothing."""
    path = [np.zeros_like(core.nvec)]
    for component in np.random.default_rng(seed).permutation(len(core.nvec)):
        path.append(path[-1].copy())
        path[-1][component] = 1
    return np.stack(path)


def test_the_ways_of_all_stages_together_are_the_path(core):
    path = path_of(core)
    parts = stage_choices(core, path)
    assert sorted(np.concatenate([part.components for part in parts])) == list(range(len(core.nvec)))
    assert parts[0].components.tolist() == [0, 1, len(core.nvec) - 1]  # tokens are dropped at the first one
    for part in parts:
        assert (np.diff(part.ways, axis=0).sum(axis=1) == 1).all()
        assert len(part.ways) == len(part.components) + 1
        own = np.isin(np.arange(len(core.nvec)), part.components)
        assert {tuple(mask * own) for mask in path} == {tuple(way) for way in part.ways}


def test_a_later_stage_is_looked_at_densely_and_under_what_came_before(core):
    path = path_of(core)
    parts = stage_choices(core, path)
    n, components = 200, path.shape[1]
    first = earlier_decisions(n, components, [], np.random.default_rng(0), answers=False)
    assert first.shape == (n, 1, components)
    assert not first.any()
    dense, drawn = earlier_decisions(n, components, parts[:1], np.random.default_rng(0), answers=False).swapaxes(0, 1)
    assert not dense.any()
    assert {tuple(decision) for decision in drawn} == {tuple(way) for way in parts[0].ways}


def test_an_answer_is_looked_at_under_many_masks(core):
    parts = stage_choices(core, path_of(core))
    under = earlier_decisions(50, len(core.nvec), parts, np.random.default_rng(0), answers=True)
    assert under.shape == (50, ANSWERS, len(core.nvec))
    for part in parts:
        seen = {tuple(decision) for decision in under[:, :, part.components].reshape(-1, len(part.components))}
        assert seen == {tuple(way) for way in part.ways[:, part.components]}


@st.composite
def risks(draw):
    """Risk and FLOPs of a few ways, each skipping one candidate more."""
    ways = draw(st.integers(2, 6))
    saved = draw(st.lists(st.floats(0.02, 0.2), min_size=ways - 1, max_size=ways - 1))
    risk = draw(st.lists(st.floats(0.0, 0.4), min_size=ways, max_size=ways))
    return torch.tensor([1 - sum(saved[:way]) for way in range(ways)]), torch.tensor(risk)


@given(risks())
@settings(deadline=None)
def test_at_each_price_the_steps_that_pay_lead_to_the_cheapest_way(given_risks):
    flops, risk = given_risks
    outcomes = torch.stack([flops, risk, 0 * risk], dim=-1)[None, :, None].expand(1, -1, len(LOG_PRICES), -1)
    prices = LOG_PRICES.exp()
    logits = price_logits(costs(outcomes, prices), LOG_PRICES)[0]
    assert (logits.diff() <= 1e-5).all()
    for number, price in enumerate(LOG_PRICES):
        if (logits - price).abs().min() > 0.26:  # a price between two of them is read off a line
            way = int((logits > price).sum())
            cheapest = best(outcomes, prices)[0, number]
            assert outcomes[0, way, 0, 0] + prices[number] * outcomes[0, way, 0, 1] == pytest.approx(
                float(cheapest[0] + prices[number] * cheapest[1]), abs=1e-5
            )
