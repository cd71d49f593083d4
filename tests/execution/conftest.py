"""Decisions at random, on a small env."""

import numpy as np

SMALL = {"train_size": 40, "validation_size": 20, "test_size": 40, "token_shares": [0.0, 0.3, 0.6]}


def random_decisions(core, n, rate=0.5, seed=0):
    """Decisions with every switch skipped at ``rate``, and any token level."""
    random = np.random.default_rng(seed)
    skip = (random.random((n, core.n_switches)) < rate).astype(np.int64)
    return np.column_stack([skip, random.integers(core.nvec[-1], size=n)])


class Drawn:
    """Decides at random, and notes what it has seen."""

    flops = 0

    def __init__(self, core):
        self.core, self.seen = core, []

    def decide(self, observations):
        self.seen.append(observations)
        return random_decisions(self.core, len(observations))
