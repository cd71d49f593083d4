"""From logits to choices: all components at once are each alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from sd_gym.policy import DecisionPolicy
from sd_gym.policy.choices import bounded
from tests.policy.conftest import policy_of


@settings(max_examples=40, deadline=None)
@given(nvec=st.lists(st.integers(1, 5), min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_all_components_are_chosen_at_once_as_one_by_one(nvec, seed):
    """Also where logits are equal, infinite or no numbers."""
    policy = DecisionPolicy(3, nvec, [])
    logits = torch.randint(0, 3, (20, sum(nvec)), generator=torch.Generator().manual_seed(seed)).float()
    logits[0], logits[1] = -torch.inf, torch.nan
    one_by_one = torch.stack([part.argmax(dim=1) for part in logits.split(nvec, dim=1)], dim=1)
    calls = []

    class Counted(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Counted():
        chosen = policy.choose(logits)
    assert torch.equal(chosen, one_by_one)
    assert calls.count("argmax") == 1


@settings(max_examples=40, deadline=None)
@given(nvec=st.lists(st.integers(1, 4), min_size=1, max_size=7), seed=st.integers(0, 1000))
def test_a_users_pick_gets_each_component(nvec, seed):
    policy, seen = policy_of(seed, nvec=nvec)
    logits = policy(torch.as_tensor(seen)).detach()
    chosen = policy.choose(logits, lambda choices: choices.argmin(dim=1))
    one_by_one = torch.stack([part.argmin(dim=1) for part in logits.split(nvec, dim=1)], dim=1)
    assert torch.equal(chosen, one_by_one)


@pytest.mark.parametrize("size", [2, 7, 25, 1300])
def test_exploration_keeps_the_order_of_however_many_choices(size):
    logits = torch.linspace(-1, 2, size)
    shares = bounded(logits, 0.2).exp()
    assert shares.sum() == pytest.approx(1, abs=1e-4)
    assert (shares.diff() >= 0).all()
    assert shares.min() >= min(0.2, 0.5 / size) - 1e-6
