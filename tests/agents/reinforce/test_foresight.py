"""Foresight: what REINFORCE expects a decision to cost an input."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import torch
from sd_gym.agents.reinforce.foresight import Foresight

SPACE = gym.spaces.Box(-10, 10, (4,))
NVEC = np.array([2, 2, 2, 3])


def scored(n, seed):
    """Observations, decisions, losses: skipping the second switch costs those inputs whose first feature is high."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(n, 4, generator=generator)
    decisions = torch.stack([torch.randint(int(size), (n,), generator=generator) for size in NVEC], dim=1)
    return observations, decisions, ((observations[:, 0] > 0) & (decisions[:, 1] == 1)).float()


def fitted(steps=400):
    torch.manual_seed(0)
    foresight = Foresight(SPACE, NVEC)
    observations, decisions, lost = scored(2000, seed=1)
    foresight.remember(np.arange(1000), decisions[:1000], lost[:1000])
    foresight.remember(np.arange(1000, 2000), decisions[1000:], lost[1000:])
    random = np.random.default_rng(0)
    for _ in range(steps):
        drawn = torch.from_numpy(random.integers(2000, size=128))
        foresight.fit(observations[foresight.rows[drawn]], drawn)
    return foresight


def test_it_finds_which_skip_is_to_blame_and_for_which_inputs():
    foresight = fitted()
    observations, decisions, lost = scored(1000, seed=2)
    clear = observations[:, 0].abs() > 0.3
    foreseen = foresight.loss(observations, decisions)
    assert ((foreseen > 0.5) == (lost > 0.5))[clear].float().mean() > 0.97
    assert foresight.loss(observations, torch.zeros_like(decisions)).abs().mean() < 0.1


def test_gains_are_foreseen_as_negative_losses():
    torch.manual_seed(0)
    foresight = Foresight(SPACE, NVEC)
    observations, decisions, lost = scored(500, seed=3)
    foresight.remember(np.arange(500), decisions, -lost)
    for _ in range(300):
        foresight.fit(observations, torch.arange(500))
    assert foresight.loss(observations, decisions)[lost == 1].mean() < -0.7


def test_before_it_has_learned_it_expects_to_lose_next_to_nothing():
    observations, decisions, _ = scored(100, seed=4)
    assert Foresight(SPACE, NVEC).loss(observations, decisions).abs().max() < 0.1


def test_numbers_of_many_masks_are_remembered_as_they_are():
    foresight = Foresight(SPACE, np.array([300]))
    decisions = torch.tensor([[0], [127], [128], [299]])
    foresight.remember(np.arange(4), decisions, torch.zeros(4))
    assert torch.equal(foresight.decisions.long(), decisions)
    foresight.fit(torch.zeros(4, 4), torch.arange(4))


def test_its_state_goes_on_as_if_nothing_had_happened():
    one, other = fitted(50), Foresight(SPACE, NVEC)
    other.load_state(deepcopy(one.state()))  # a checkpoint is a copy
    observations, decisions, _ = scored(100, seed=5)
    drawn = torch.arange(100)
    assert one.fit(observations, drawn) == other.fit(observations, drawn)
    assert torch.equal(one.loss(observations, decisions), other.loss(observations, decisions))
    assert torch.equal(one.rows, other.rows)
