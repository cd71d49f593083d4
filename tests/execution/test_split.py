"""A part of a split is what the split is."""

import gymnasium as gym
import numpy as np

from tests.execution.conftest import SMALL, Drawn


def test_an_unseen_part_of_a_split_is_what_the_split_is():
    core = gym.make("SD/QuestionAnswering-Mini-v0", **SMALL).unwrapped.core
    split, rows = core.split("test"), np.array([7, 3, 3, 30])
    part, decisions = split.unseen(rows), Drawn(core).decide(rows)
    everything = np.arange(4)
    np.testing.assert_allclose(core.observe(part, everything), core.observe(split, rows), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(part.costs.flops(everything, decisions), split.costs.flops(rows, decisions))
    np.testing.assert_array_equal(part.tokens.scores, split.tokens.scores[rows])
    np.testing.assert_array_equal(part.scoring.run(everything, decisions), split.scoring.run(rows, decisions))
