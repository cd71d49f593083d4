"""Controls that learn nothing."""

import numpy as np
from sd_gym.agents import make_agent


def test_hash_decides_alike_on_the_same_input_and_says_nothing_about_it(env):
    observations = np.random.default_rng(0).normal(size=(400, *env.single_observation_space.shape)).astype(np.float32)
    policy = make_agent("hash", env, rate=0.3).policy()
    decisions = policy.decide(observations)
    order = np.random.default_rng(1).permutation(400)
    np.testing.assert_array_equal(policy.decide(observations[order]), decisions[order])
    np.testing.assert_allclose(decisions[:, :-1].mean(axis=0), 0.3, atol=0.1)


def test_every_other_layer(env):
    observations = env.core.observe(env.core.split("train"), np.arange(4))
    decisions = make_agent("every-other", env).policy().decide(observations)
    assert env.core.backbone.board.names[2].startswith("encoder.1")
    np.testing.assert_array_equal(decisions, np.tile([0, 0, 1, 1, 0, 0, 0], (4, 1)))


def test_controls(env):
    observations = env.core.observe(env.core.split("train"), np.arange(32))
    assert not make_agent("dense", env).policy().decide(observations).any()
    policy = make_agent("random", env, rate=0.3).policy()
    decisions = policy.decide(observations)
    assert 0.15 < decisions[:, :-1].mean() < 0.45
    assert len(np.unique(decisions, axis=0)) > 5
    np.testing.assert_array_equal(policy.decide(observations), decisions)
