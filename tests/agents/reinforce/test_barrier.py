"""The dynamic barrier on a problem with a known answer: f = |t - (2, 2)|^2 under q = (t1 + t2 - 1)^2.

The end points are worked out by hand: q is lowest on the line t1 + t2 = 1, where f is lowest at (0.5, 0.5); q <= 0.04
lets t1 + t2 reach 1.2, where f is lowest at (0.6, 0.6) and is 2 * 1.4^2 = 3.92.
"""

import pytest
import torch
from sd_gym.agents.reinforce.barrier import DynamicBarrier

TARGET = torch.tensor([2.0, 2.0])


def f(t):
    return ((t - TARGET) ** 2).sum().item()


def q(t):
    return (t.sum().item() - 1) ** 2


def gradients(t):
    return 2 * (t - TARGET), 2 * (t.sum() - 1) * torch.ones(2)


def descend(barrier, *, steps=4000, sign=1, noise=0.0, halves=True, seed=0):
    """Gradient descent with step 0.01; returns the mean of the last thousand points."""
    generator = torch.Generator().manual_seed(seed)
    t, last = torch.tensor([0.0, 0.0]), []
    for step in range(steps):
        grad_f, grad_q = gradients(t)
        fs, qs = ([g + noise * torch.randn(2, generator=generator) for _ in range(2)] for g in (grad_f, grad_q))
        mean_f, mean_q = (fs[0] + fs[1]) / 2, (qs[0] + qs[1]) / 2
        if halves:
            weight = barrier.weigh(q(t), tuple(fs), tuple(qs))
        else:  # naive: the squared norm of one noisy gradient
            weight = barrier.weigh(q(t), (mean_f, mean_f), (mean_q, mean_q))
        t = t - 0.01 * (mean_f + sign * weight.multiplier * mean_q)
        if step >= steps - 1000:
            last.append(t)
    return torch.stack(last).mean(dim=0)


def test_lexicographic_ends_where_q_is_lowest_and_then_f():
    end = descend(DynamicBarrier("lexicographic"))
    assert end.tolist() == pytest.approx([0.5, 0.5], abs=1e-2)


def test_constrained_ends_at_the_limit():
    end = descend(DynamicBarrier("constrained", limit=0.04))
    assert end.tolist() == pytest.approx([0.6, 0.6], abs=5e-3)
    assert f(end) == pytest.approx(3.92, abs=0.03)


@pytest.mark.parametrize("control", ["lexicographic", "constrained"])
def test_a_flipped_sign_ends_elsewhere(control):
    """The two tests above can fail: with lambda's sign flipped q is climbed, not kept."""
    end = descend(DynamicBarrier(control, limit=0.04), sign=-1, steps=1500)
    assert not q(end) < 0.1


def test_halves_keep_the_constraint_under_noise_where_the_naive_norm_does_not():
    violations = {"naive": [], "halves": []}
    for seed in range(3):
        naive = DynamicBarrier("constrained", limit=0.04, alpha=20.0, memory=0.98)
        violations["naive"].append(q(descend(naive, noise=1.0, halves=False, seed=seed)) - 0.04)
        careful = DynamicBarrier("constrained", limit=0.04, alpha=20.0, memory=0.98)
        violations["halves"].append(q(descend(careful, noise=1.0, seed=seed)) - 0.04)
    assert min(violations["naive"]) > 0.1
    assert max(violations["halves"]) < 0.02


def test_the_multiplier_is_capped_and_never_negative():
    barrier = DynamicBarrier("constrained", highest=7.0)
    one = torch.tensor([1.0, 0.0])
    assert barrier.weigh(1.0, (-one, -one), (1e-4 * one, 1e-4 * one)).multiplier == 7.0
    assert DynamicBarrier("constrained", limit=1.0).weigh(0.0, (one, one), (one, one)).multiplier == 0.0


def test_what_is_logged():
    weight = DynamicBarrier("lexicographic").weigh(
        0.5, (torch.tensor([3.0, 0.0]),) * 2, (torch.tensor([0.0, 4.0]),) * 2
    )
    assert weight.norm_f == pytest.approx(3.0)
    assert weight.norm_q == pytest.approx(4.0)
    assert weight.cosine == pytest.approx(0.0)
    assert weight.phi == pytest.approx(16.0)
    assert weight.multiplier == pytest.approx(1.0)


def test_averages_are_state():
    gradient = torch.tensor([1.0, 2.0])
    first, second = (DynamicBarrier("constrained", memory=0.9) for _ in range(2))
    first.weigh(0.3, (gradient, gradient), (gradient, -gradient))
    second.load_state(first.state())
    arguments = (0.1, (gradient, gradient), (gradient, gradient))
    assert first.weigh(*arguments) == second.weigh(*arguments)
