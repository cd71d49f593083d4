"""Cheap first, and again where that is not sure."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.experiment.run import train


def test_a_cascade_runs_again_where_it_is_not_sure(settings, tmp_path):
    env = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped
    agent, split = make_agent("cascade", env), env.core.split("train")
    rows = np.arange(len(split))
    assert not agent.decide_split(split).decisions.any()  # before it has searched: dense, once
    assert not agent.decide_split(split).flops.any()
    agent.mask = np.array([0, 0, 1, 1, 1, 1, 0])
    masked = np.tile(agent.mask, (len(rows), 1))
    confidence = split.passes.confidence(rows, masked)
    agent.threshold = float(np.median(confidence))
    unsure = confidence < agent.threshold
    assert 0 < unsure.sum() < len(rows)
    decided = agent.decide_split(split)
    np.testing.assert_array_equal(decided.decisions, np.where(unsure[:, None], 0, masked))
    np.testing.assert_array_equal(decided.flops, np.where(unsure, split.costs.flops(rows, masked), 0))
    result = train("SD/Classification-Custom-v0", "cascade", tmp_path / "run", steps=1, settings=settings)
    assert result["flops_ratio_with_policy"] >= result["flops_ratio"]
    generator = gym.make_vec("SD/Classification-Mini-v0", num_envs=1, train_size=50).unwrapped
    with pytest.raises(ValueError, match="a cascade needs a backbone that classifies"):
        make_agent("cascade", generator)
