"""Cheap first, and again where that is not sure."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.baselines.cascade import CascadePoint
from sd_gym.agents.baselines.early_exit import Confidences
from sd_gym.agents.experiment.run import train


def test_a_cascade_runs_again_where_it_is_not_sure(settings, tmp_path):
    env = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped
    split, mask = env.core.split("train"), np.array([0, 0, 1, 1, 1, 1, 0])
    rows = np.arange(0, len(split), 2)
    masked = np.tile(mask, (len(rows), 1))
    confidence = split.passes.confidence(rows, masked)
    threshold = float(np.median(confidence))
    unsure = confidence < threshold
    assert 0 < unsure.sum() < len(rows)
    decided = CascadePoint(mask, threshold, Confidences()).decide_split(split, rows)
    np.testing.assert_array_equal(decided.decisions, np.where(unsure[:, None], 0, masked))
    costs = split.costs
    both = costs.flops(rows, masked) + costs.going_on(rows, masked)
    np.testing.assert_array_equal(decided.flops, np.where(unsure, both - costs.dense_flops(rows), 0))
    agent = make_agent("cascade", env)
    assert agent.operating_points() == []  # before it has searched
    agent.learn(1, None, lambda rollout: None)
    assert {len(point.policy.mask) for point in agent.operating_points()} == {7}
    keys = {**settings, "epsilon": 1.0}
    result = train("SD/Classification-Custom-v0", "cascade", tmp_path / "run", steps=1, **keys, confidence=0.5)
    assert result["flops_ratio_with_policy"] >= result["flops_ratio"]
    assert result["guarantee"].startswith("selected on 4 rows: loses less than 100 points with 50% confidence; on ")
    assert result["flops_ratio_with_policy"] < 1
    assert result["last_policy"]["flops_ratio_with_policy"] < 1
    generator = gym.make_vec("SD/Classification-Mini-v0", num_envs=1, train_size=50).unwrapped
    with pytest.raises(ValueError, match="a cascade needs a backbone that classifies"):
        make_agent("cascade", generator)


def test_a_cascade_searches_whole_layers_if_asked(settings):
    env = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped
    agent = make_agent("cascade", env, per="layer")
    agent.learn(1, None, lambda rollout: None)
    switches = np.array([point.policy.mask[:6] for point in agent.operating_points()]).reshape(-1, 3, 2)
    assert len(switches)
    np.testing.assert_array_equal(switches[..., 0], switches[..., 1])
