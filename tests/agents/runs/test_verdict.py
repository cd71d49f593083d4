"""The verdict "quality kept": how often it is wrong where exactly epsilon is lost, and how many instances it takes."""

import numpy as np
import pytest
from scipy.stats import binom
from sd_gym.agents.runs.verdict import (
    Verdict,
    changes_allowed,
    difference_interval,
    fewest_instances,
    highest_loss,
    losses_allowed,
    verdict,
)

SIMULATIONS = 1000
SLACK = 3 * np.sqrt(0.05 * 0.95 / SIMULATIONS)  # of a simulated rate: three of its standard errors


def judged(difference, epsilon=0.01, confidence=0.95):
    return verdict(1.0 + difference, np.ones(len(difference)), epsilon, confidence)


def binary(random, n, gained, epsilon):
    """Paired outcomes: ``gained`` of the instances become right, so many and ``epsilon`` more become wrong."""
    drawn = random.random(n)
    return np.where(drawn < gained, 1.0, 0.0) - ((drawn >= gained) & (drawn < 2 * gained + epsilon))


def graded(random, n, ruined, epsilon):
    """A share of the instances is ruined, all others lose a little, in all ``epsilon``."""
    others = random.normal(-(epsilon - ruined) / (1 - ruined), 0.02, n)
    return np.where(random.random(n) < ruined, -1.0, others)


@pytest.mark.parametrize("n", [300, 500, 872, 2000])
@pytest.mark.parametrize(
    ("draw", "share"), [(binary, 0.0), (binary, 0.01), (binary, 0.1), (graded, 0.01), (graded, 0.005)]
)
def test_a_policy_that_loses_epsilon_is_rarely_said_to_keep_the_quality(n, draw, share):
    random = np.random.default_rng(0)
    wrong = np.mean([judged(draw(random, n, share, 0.01)) == Verdict.KEPT for _ in range(SIMULATIONS)])
    assert wrong <= 0.05 + SLACK


@pytest.mark.parametrize(("n", "ruined", "confidence"), [(167, 0.0217, 0.8), (230, 0.0146, 0.9), (396, 0.0112, 0.95)])
def test_small_gains_do_not_hide_rare_losses(n, ruined, confidence):
    """The exact probability of the verdict if exactly epsilon is lost: few instances lose all, all others gain."""
    gain, wrong = (ruined - 0.01) / (1 - ruined), 0.0
    for lost in range(int(n * ruined) + 2):
        if judged(np.r_[-np.ones(lost), np.full(n - lost, gain)], confidence=confidence) == Verdict.KEPT:
            wrong += binom.pmf(lost, n, ruined)
    assert wrong <= 1.1 * (1 - confidence)


def test_a_policy_that_loses_much_is_never_said_to_on_few_instances():
    random = np.random.default_rng(0)
    for n in (5, 20, 100):
        assert {judged(binary(random, n, 0.0, 0.1)) for _ in range(200)} == {Verdict.TOO_FEW}


def test_a_policy_that_keeps_the_quality_is_mostly_said_to():
    random = np.random.default_rng(0)
    kept = [judged(binary(random, 2000, 0.005, 0.0)) == Verdict.KEPT for _ in range(200)]
    assert np.mean(kept) > 0.9


def test_how_many_instances_it_takes():
    assert fewest_instances(0.01) == 299  # 0.99^299 = 0.0495: the rule of three
    assert judged(np.zeros(298)) == Verdict.TOO_FEW
    assert judged(np.zeros(299)) == Verdict.KEPT
    assert judged(np.zeros(0)) == Verdict.TOO_FEW
    assert judged(np.zeros(10_000), epsilon=0.0) == Verdict.TOO_FEW  # to lose nothing at all cannot be shown
    assert judged(np.zeros(890), confidence=0.99865) == Verdict.TOO_FEW
    assert judged(np.zeros(891), confidence=0.99865) == Verdict.KEPT
    assert fewest_instances(1.0) == 0
    assert judged(-np.ones(3), epsilon=1.5) == Verdict.KEPT  # there is no more to lose


def test_the_mean_has_to_be_above_the_limit_by_more_than_chance():
    loses_1_percent = np.r_[-np.ones(20), np.zeros(1980)]
    assert judged(loses_1_percent) == Verdict.NOT_SHOWN
    assert judged(np.r_[-np.ones(11), np.zeros(1989)]) == Verdict.KEPT
    assert judged(np.r_[-np.ones(11), np.zeros(1989)], confidence=0.9995) == Verdict.NOT_SHOWN
    low, high = difference_interval(1 + loses_1_percent, np.ones(2000))
    assert low < -0.01 < high < 0


@pytest.mark.parametrize("n", [50, 300, 1000, 2000])
@pytest.mark.parametrize(("gained", "lost"), [(0.0, 0.001), (0.0, 0.005), (0.005, 0.0), (0.01, 0.01), (0.1, 0.05)])
def test_the_interval_holds_the_difference_also_where_few_answers_differ(n, gained, lost):
    random = np.random.default_rng(0)
    held = []
    for _ in range(SIMULATIONS):
        low, high = difference_interval(1 + binary(random, n, gained, lost), np.ones(n))
        held.append(low <= -lost <= high)
    assert np.mean(held) >= 0.95 - SLACK


def test_the_interval_of_no_difference_has_a_width():
    low, high = difference_interval(np.ones(299), np.ones(299))
    assert low == -high
    assert 0.005 < high < 0.02
    assert difference_interval(np.zeros(2), np.ones(2))[0] == -1  # no more can be lost
    weighted = difference_interval(np.ones(299), np.ones(299), highest=5.0)
    assert weighted[1] > 4 * high


def test_where_an_instance_weighs_more_more_of_them_are_needed():
    """Qualities that are weighted by class go above 1, so an instance can lose more."""
    weight = np.r_[np.full(200, 5.0), np.full(200, 0.5)]
    assert verdict(weight, weight, 0.01) == Verdict.TOO_FEW
    assert verdict(np.ones(400), np.ones(400), 0.01) == Verdict.KEPT
    # Also where no instance of the rare class is right densely.
    assert verdict(np.ones(400), np.ones(400), 0.01, highest=5.0) == Verdict.TOO_FEW
    assert highest_loss(np.ones(400), np.ones(400), highest=5.0) > 4 * highest_loss(np.ones(400), np.ones(400))
    for allowed in (losses_allowed, changes_allowed):
        assert allowed(400, 0.01, highest=5.0) is None
        assert allowed(2000, 0.01, highest=5.0) < allowed(2000, 0.01)


@pytest.mark.parametrize(("n", "lost", "gained"), [(300, 0, 0), (300, 5, 0), (2000, 0, 30), (2000, 60, 40), (0, 0, 0)])
def test_the_bound_of_the_loss_is_where_the_verdict_turns(n, lost, gained):
    quality, quality_ref = np.ones(n), np.ones(n)
    quality[:lost] = 0
    quality_ref[n - gained :] = 0
    bound = highest_loss(quality, quality_ref)
    assert verdict(quality, quality_ref, bound + 1e-5) == Verdict.KEPT or n == 0
    assert verdict(quality, quality_ref, bound - 1e-5) != Verdict.KEPT
    assert bound > (lost - gained) / max(n, 1)
    assert highest_loss(quality, quality_ref, 0.99) >= bound


def test_the_power_is_what_the_verdict_says():
    for n, epsilon in ((299, 0.01), (872, 0.005), (2000, 0.01), (50, 0.2)):
        for allowed, gained in ((losses_allowed(n, epsilon), False), (changes_allowed(n, epsilon), True)):
            assert allowed >= 0
            for changed in range(0, allowed + 2 + gained, 1 + gained):
                quality, quality_ref = np.ones(n), np.ones(n)
                quality[: changed // 2 if gained else changed] = 0
                quality_ref[n - changed // 2 :] = 0 if gained else 1
                kept = verdict(quality, quality_ref, epsilon) == Verdict.KEPT
                assert kept == (changed <= allowed), (n, epsilon, changed)


def test_too_few_instances_allow_nothing():
    least = fewest_instances(0.01)
    assert losses_allowed(least, 0.01) == 0
    assert losses_allowed(least - 1, 0.01) is None
    assert changes_allowed(least - 1, 0.01) is None
    assert losses_allowed(1000, 0.0) is None
