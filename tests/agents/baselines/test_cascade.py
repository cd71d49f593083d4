"""Cheap first, and again where that is not sure."""

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.experiment.run import train

import sd_gym

STAGES = ["first", "answer"]


def test_a_cascade_is_a_policy_that_goes_on_from_unsure_answers(settings, tmp_path):
    keys = {**settings, "stages": STAGES, "epsilon": 1.0}
    result = train("SD/Classification-Custom-v0", "cascade", tmp_path / "run", steps=1, **keys, confidence=0.5)
    assert result["guarantee"].startswith("selected on 4 rows: loses less than 100 points with 50% confidence; on ")
    assert result["flops_ratio"] < 1
    assert result["last_policy"]["flops_ratio_with_policy"] < 1
    texts, dense = ["a lovely film", "a dull film", "what a waste"], sd_gym.load(tmp_path / "run", max_loss=0.0)
    assert len({answer.skip.tobytes() for answer in sd_gym.load(tmp_path / "run")(texts)}) == 1
    assert all(answer.went_on == answer.skip.any() for answer in dense(texts))
    with pytest.raises(ValueError, match=r"its hidden is 1, expected .*: a cascade is no start"):
        train("SD/Classification-Custom-v0", "ppo", tmp_path / "next", start=tmp_path / "run", **keys)


def test_a_cascade_judges_generated_texts(tmp_path):
    keys = {"train_size": 10, "validation_size": 30, "test_size": 10, "epsilon": 0.5}
    result = train("SD/Summarization-Mini-v0", "cascade", tmp_path / "run", steps=1, stages=STAGES, **keys, per="layer")
    assert 0 < result["flops_ratio"] < 1
    assert (tmp_path / "run" / "skip_policy.json").exists()


def test_a_cascade_needs_the_answer_stage(settings):
    env = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped
    with pytest.raises(ValueError, match="it needs stages that end with answer"):
        make_agent("cascade", env)


def test_a_cascade_searches_whole_layers_if_asked(settings):
    env = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, stages=STAGES, **settings).unwrapped
    agent = make_agent("cascade", env, per="layer")
    assert agent.operating_points() == []  # before it has searched
    agent.learn(1, None, lambda rollout: None)
    switches = agent.masks[:, :6].reshape(-1, 3, 2)
    assert switches.any()
    np.testing.assert_array_equal(switches[..., 0], switches[..., 1])
