"""Foresight in stages: what a decision leads to when later stages decide on what they will see.

A problem of two stages: the early switch is worth 0.1 of the FLOPs, the late one 0.8. Half of the instances need the
late one, and a late look tells which, but only if the early one ran.
"""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sd_gym.agents.reinforce import staged_foresight
from sd_gym.agents.reinforce.staged_foresight import StagedForesight

from sd_gym.envs.actions import StageActions
from sd_gym.policy import DecisionPolicy

NVEC = np.array([2, 2])
STAGES = ["first", "encoder.1"]
SIZE = 3  # the stage, one-hot, and the hint


def flops_ratio(rows, decisions):
    return 1 - decisions @ np.array([0.1, 0.8])


CORE = SimpleNamespace(
    stages=STAGES,
    nvec=NVEC,
    observation_space=SimpleNamespace(shape=(SIZE,)),
    stage_actions=StageActions([np.array([0]), np.array([1])], NVEC),
)
SPLIT = SimpleNamespace(costs=SimpleNamespace(flops_ratio=flops_ratio))


def scored(n, seed):
    """Rows, decisions at random, the quality lost, and what was seen."""
    random = np.random.default_rng(seed)
    rows, decisions = random.integers(100, size=n), torch.from_numpy(random.integers(2, size=(n, 2)))
    hard = torch.from_numpy(rows % 2)
    seen = torch.zeros(n, 2, SIZE)
    seen[:, 0, 0] = seen[:, 1, 1] = 1
    seen[:, 1, 2] = torch.where(decisions[:, 0] == 1, 0, 2 * hard - 1)
    return rows, decisions, ((decisions[:, 1] == 1) & (hard == 1)).float(), seen


def foresight(n=4000):
    torch.manual_seed(0)
    new = StagedForesight(CORE, SPLIT)
    new.remember(*scored(n, seed=1))
    return new


def cautious(seen):
    """A policy that skips late where the look tells that it may."""
    return torch.stack([torch.zeros(len(seen)), seen[:, 2] < 0], dim=1).long()


def bold(seen):
    """A policy that always skips late."""
    return torch.ones(len(seen), 2, dtype=torch.int64)


def early_outlook(fitted):
    """Of the early choices 0 and 1: quality lost, and FLOPs."""
    states = fitted.states(torch.arange(2), torch.zeros(2, dtype=torch.int64))
    odds, flops = fitted.predict(states, fitted.with_choices(states, torch.tensor([[0, 0], [1, 0]])))
    return (odds[:, 0] - odds[:, 1]).tolist(), flops.tolist()


@pytest.mark.parametrize(
    ("policy", "lost", "flops"),
    [(cautious, [0.0, 0.0], [0.6, 0.9]), (bold, [0.5, 0.5], [0.2, 0.1])],  # by hand: half of the instances are hard
)
def test_an_early_choice_is_worth_what_the_policy_makes_of_it(policy, lost, flops):
    fitted, random = foresight(), np.random.default_rng(0)
    for _ in range(400):
        fitted.fit_stages(128, random, policy)
    losses, ratios = early_outlook(fitted)
    assert losses == pytest.approx(lost, abs=0.1)
    assert ratios == pytest.approx(flops, abs=0.05)


def test_the_last_stage_foresees_no_flops_as_they_are_known():
    new = foresight(n=50)
    with torch.no_grad():
        new.network[-1].bias[2] = 7.0
    states = new.states(torch.arange(50), torch.ones(50, dtype=torch.int64))
    decisions = new.with_choices(states, torch.ones(50, 2, dtype=torch.int64))
    assert torch.equal(decisions[:, 0], new.decisions[:, 0].long())  # the early stage's stay as they were
    np.testing.assert_allclose(new.predict(states, decisions)[1], flops_ratio(None, decisions.numpy()), rtol=1e-6)


def test_a_situation_knows_nothing_of_what_is_decided_from_there_on():
    new = foresight(n=200)
    for stage in (0, 1):
        states = new.states(torch.arange(200), torch.full((200,), stage))
        assert not states.decisions[:, stage:].any()
        assert torch.equal(states.decisions[:, :stage].int(), new.decisions[:, :stage])
        assert (states.observations[:, stage] == 1).all()


def test_only_the_choices_of_its_stage_count_in_the_policy_gradient():
    new, policy = foresight(n=6), DecisionPolicy(SIZE, NVEC.tolist(), ["early", "late"], stages=STAGES)
    states = new.states(torch.arange(6), torch.tensor([0, 1] * 3))
    logits, choices = policy(states.observations), torch.ones(12, 2, dtype=torch.int64)  # two tries on each
    log_prob, entropy = policy.evaluate_decisions(*new.without_other_stages(states, logits, choices))
    expected, _ = policy.evaluate_decisions(logits, choices)
    own = torch.tensor([[True, False], [False, True]] * 6)
    assert torch.equal(log_prob, torch.where(own, expected, 0.0))
    gradient = torch.autograd.grad(log_prob[:, 0].sum(), logits)[0]
    assert torch.equal(gradient != 0, torch.tensor([[True, True, False, False], [False] * 4] * 3))
    assert (entropy <= np.log(2) + 1e-6).all()


def test_the_oldest_is_forgotten(monkeypatch):
    monkeypatch.setattr(staged_foresight, "MEMORY", 10 * len(STAGES) * SIZE)
    new, (rows, *others) = foresight(n=8), scored(8, seed=2)
    first = new.rows.clone()
    new.remember(rows, *others)
    assert torch.equal(new.rows, torch.cat([first[-2:], torch.from_numpy(rows)]))
    assert {len(new.decisions), len(new.lost), len(new.observed)} == {10}


def test_its_state_goes_on_as_if_nothing_had_happened():
    one, other = foresight(n=100), StagedForesight(CORE, SPLIT)
    one.fit_stages(32, np.random.default_rng(0), cautious)
    other.load_state(deepcopy(one.state()))
    errors = [each.fit_stages(32, np.random.default_rng(1), cautious) for each in (one, other)]
    assert errors[0] == errors[1]
    assert early_outlook(one) == early_outlook(other)


def test_one_late_look_alone_is_fitted_as_well():
    core = SimpleNamespace(
        **{**vars(CORE), "stages": ["encoder.1"], "stage_actions": StageActions([np.arange(2)], NVEC)}
    )
    new, (rows, decisions, lost, seen) = StagedForesight(core, SPLIT), scored(100, seed=1)
    new.remember(rows, decisions, lost, seen[:, 1:])
    assert np.isfinite(new.fit_stages(8, np.random.default_rng(0), cautious))
