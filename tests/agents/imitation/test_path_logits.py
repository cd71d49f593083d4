"""Exchange rates of FLOPs and risk along a path of masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_gym.agents.imitation.path_logits import above_hull, component_logits, step_logits

from sd_gym.policy import DecisionPolicy


@st.composite
def paths(draw):
    """What each of a few instances risks under the masks of a path, and what the masks cost."""
    masks = draw(st.integers(2, 8))
    saved = draw(st.lists(st.integers(1, 20), min_size=masks - 1, max_size=masks - 1))
    values = st.lists(st.integers(-50, 100), min_size=masks - 1, max_size=masks - 1)
    risk = draw(st.lists(values, min_size=1, max_size=4))
    flops = 1 - np.cumsum([0, *saved]) / (1 + sum(saved))
    return np.column_stack([np.zeros(len(risk)), np.array(risk) / 100]), flops


@given(paths(), st.floats(0.05, 200.0))
@settings(deadline=None)
def test_a_bound_on_the_logits_ends_the_path_at_the_best_mask(path, multiplier):
    risk, flops = path
    logits = step_logits(torch.from_numpy(risk).float(), torch.from_numpy(flops)).numpy()
    assert (np.diff(logits, axis=1) <= 1e-6).all()
    taken = (logits > np.log(multiplier)).sum(axis=1)
    price = flops + multiplier * risk
    np.testing.assert_allclose(price[np.arange(len(risk)), taken], price.min(axis=1), rtol=1e-4, atol=1e-4)


def test_steps_that_only_pay_together_have_one_rate():
    risk = torch.tensor([[0.0, 0.10, 0.02, 0.52]])  # the second mask alone is worse than the third, which is cheaper
    flops = torch.tensor([1.0, 0.9, 0.8, 0.3])
    steps = step_logits(risk, flops)
    torch.testing.assert_close(steps.exp(), torch.tensor([[10.0, 10.0, 1.0]]))
    torch.testing.assert_close(above_hull(risk, flops, steps), torch.tensor([[0.09, 0.0, 0.0]]))


def test_many_instances_have_the_rates_of_each_alone(monkeypatch):
    risk, flops = torch.rand(7, 5).cumsum(dim=1), torch.linspace(1, 0, 5)
    monkeypatch.setattr("sd_gym.agents.imitation.path_logits.RATES", 3 * 5**2)
    alone = torch.cat([step_logits(row[None], flops) for row in risk])
    torch.testing.assert_close(step_logits(risk, flops), alone, rtol=0, atol=0)


@pytest.mark.parametrize("masks", [8, 512])
def test_of_a_long_path_fewer_instances_are_computed_at_once(masks, monkeypatch):
    sizes, inner = [], torch.where

    def noting(*arguments):
        sizes.append((rates := inner(*arguments)).numel())
        return rates

    monkeypatch.setattr(torch, "where", noting)
    step_logits(torch.rand(20, masks), torch.linspace(1, 0.1, masks))
    assert sum(sizes) == 20 * masks**2
    assert max(sizes) <= 2**22


@pytest.mark.parametrize("taken", range(5))
def test_a_policy_takes_the_steps_with_positive_logits(taken):
    nvec = np.array([2, 2, 3])
    path = np.array([[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 2]])
    steps = torch.linspace(1, -1, 4) + 0.01 + (taken - 2) * 2 / 3
    assert (steps > 0).sum() == taken
    logits = component_logits(steps[None], torch.zeros(1, 4), path, nvec)
    policy = DecisionPolicy(1, nvec.tolist(), ["a", "b"])
    np.testing.assert_array_equal(policy.choose(logits)[0], path[taken])


def test_a_step_of_several_components_raises_all_of_them():
    nvec, path = np.array([2, 2, 2, 2]), np.array([[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    logits = component_logits(torch.tensor([[2.0, -1.0, -3.0]]), torch.ones(1, 3), path, nvec)
    assert logits.tolist() == [[0, -1, 0, 2, 0, 2, 0, -3]]


def test_a_component_with_several_choices_does_not_stop_at_a_bad_mask():
    path, against = np.array([[0, 0], [1, 0], [1, 1], [2, 1]]), torch.tensor([[0.5, 0.5, 0.0]])
    assert component_logits(torch.ones(1, 3), against, path, np.array([3, 2])).tolist() == [[0, 0.5, 2, 0, 1]]
