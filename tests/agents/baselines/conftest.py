"""A tiny backbone, where everything can be tried."""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest


@pytest.fixture
def settings(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone), "epsilon": 0.0}


@pytest.fixture
def env(settings):
    vector = gym.make_vec("SD/Classification-Custom-v0", num_envs=8, **settings).unwrapped
    vector.reset(seed=0)
    return vector


def everything(core, split):
    """Outcome of every decision on every instance: decisions [64, 7], quality and FLOPs ratio [64, n]."""
    decisions = np.array(list(product(*map(range, core.nvec))))
    rows = np.arange(len(split))
    outcomes = [core.score(split, rows, np.tile(decision, (len(rows), 1))) for decision in decisions]
    return decisions, np.stack([o.quality for o in outcomes]), np.stack([o.flops_ratio for o in outcomes])


def good_in(core, split):
    """Whether decisions lose nothing, as searches ask it."""

    def good(rows, decisions):
        outcome = core.score(split, rows, decisions)
        return outcome.quality >= outcome.quality_ref

    return good


def nobody(scored):
    pass
