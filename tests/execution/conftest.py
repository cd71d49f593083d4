"""A policy that decides at random, on a small env."""

import numpy as np

SMALL = {"train_size": 40, "validation_size": 20, "test_size": 40, "token_shares": [0.0, 0.3, 0.6]}


class Drawn:
    """Decides at random, by a seed, and notes what it has seen."""

    flops = 0

    def __init__(self, core, rate=0.5):
        self.core, self.rate, self.seen = core, rate, []

    def decide(self, observations):
        self.seen.append(observations)
        random = np.random.default_rng(0)
        skip = random.random((len(observations), self.core.n_switches)) < self.rate
        return np.column_stack([skip, random.integers(self.core.nvec[-1], size=len(observations))]).astype(np.int64)
