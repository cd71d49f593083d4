"""Fronts of runs, and what is told of their difference."""

import numpy as np
from sd_gym.agents import make_agent
from sd_gym.agents.experiment.fronts import _compared, front_of
from sd_gym.agents.learning.decisions import outcomes


def test_the_interval_is_that_of_the_mean_over_runs():
    # A reading and two samples each; where one run is lucky, the other is not.
    runs = np.array([[0.4, 0.5, 0.3], [0.4, 0.3, 0.5]])
    assert _compared(runs, np.full(3, 0.45)) == ("+5.0 (+5.0 to +5.0; worst +5.0)", "0 of 2")
    assert _compared(runs, np.full(3, 0.55)) == ("+15.0 (+15.0 to +15.0; worst +15.0)", "2 of 2")
    assert _compared(runs, None) == ("-", "-")


def test_a_front_is_what_each_policy_reaches_alone(env):
    policies = [make_agent("random", env, rate=rate).policy() for rate in (0.2, 0.6)]
    policies += [policies[0].with_decision(np.zeros(len(env.core.nvec), dtype=int)), policies[1].with_margin(1.0)]
    for policy in policies:
        policy.noise = "none"
    split = env.core.split("validation")
    front = front_of(env.core, split, policies)
    for policy, quality, flops in zip(policies, front.quality, front.flops_ratio, strict=False):
        alone = outcomes(env.core, policy, split)
        own = policy.flops / split.costs.dense_flops(np.arange(len(split))) if policy.head.weight.any() else 0
        np.testing.assert_array_equal(quality, alone["quality"])
        np.testing.assert_allclose(flops, alone["flops_ratio"] + own)
    np.testing.assert_array_equal(front.flops_ratio[-1], 1.0)
    assert len(front.quality) == len(policies) + 1
