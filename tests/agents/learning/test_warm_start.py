"""An agent that begins where another run ended."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.experiment.reduction import _reduced
from sd_gym.agents.learning.decisions import DENSE_MARGIN
from sd_gym.agents.registry import make_agent

import sd_gym
from sd_gym.policy import DecisionPolicy
from tests.agents.conftest import STAGED, STAGES, bold, staged_settings, walked


def test_a_warm_start_is_refined_slowly(env, tmp_path):
    start = make_agent("random", env).policy()
    start.noise = "none"
    start.save(tmp_path)
    rates = {"ppo": 2e-4, "ppo_lagrangian": 2e-4, "ppo_lex": 2e-4, "a2c": 5e-5, "reinforce": 5e-5, "blind-a2c": 1e-3}
    for algo, rate in rates.items():
        assert make_agent(algo, env, start=tmp_path).settings.learning_rate == rate
        assert make_agent(algo, env).settings.learning_rate > rate
        assert make_agent(algo, env, start=tmp_path, learning_rate=0.5).settings.learning_rate == 0.5


@pytest.mark.parametrize("name", ["ppo_lex", "a2c", "reinforce", "imitation"])
def test_a_warm_start_begins_where_the_other_run_ended(name, env, tmp_path):
    start = make_agent("random", env, rate=0.9).policy()
    start.noise = "none"
    start.save(tmp_path)
    observations = env.core.observe(env.core.split("train"), np.arange(32))
    agent = make_agent(name, env, start=tmp_path)
    np.testing.assert_array_equal(agent.policy().decide(observations), start.decide(observations))
    offered = agent.selectable_policies()[-1]  # and, as one of those to select from, cannot be worse than it
    assert len(agent.selectable_policies()) == (1 if name == "imitation" else 2)  # which learns anew
    np.testing.assert_array_equal(offered.decide(observations), start.decide(observations))
    assert make_agent(f"blind-{name}", env, start=tmp_path).selectable_policies()[-1].blind
    policy = DecisionPolicy(3, [2, 2], ["a"])
    policy.save(tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be a start here: its observation_size is 3, expected"):
        make_agent(name, env, start=tmp_path / "other")


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_start_of_one_stage_decides_nearly_as_it_did(staged_env, algo, tmp_path):
    """At the first stage exactly; what it said of later switches is learned from what those stages see."""
    once = gym.make_vec(STAGED, num_envs=2, **{**staged_settings(staged_env), "stages": ["first"]}).unwrapped
    start = make_agent("ppo", once, seed=1).policy()
    with torch.no_grad():
        start.head.weight.mul_(100)
    start.save(tmp_path)
    agent = make_agent(algo, staged_env, start=tmp_path)
    policy, core = agent.policy(), staged_env.core
    split = core.split("train")
    rows = np.arange(len(split))
    wanted, came = start.decide(once.core.observe(split, rows)), core.rollout(split, rows, policy.decide)[0]
    assert 0.1 < wanted[:, :-1].mean() < 0.9
    assert (wanted != wanted[0]).any(axis=0)[:-1].sum() >= 4
    np.testing.assert_array_equal(came[:, core.columns[0]], wanted[:, core.columns[0]])
    assert (came == wanted)[:, :-1].mean() > 0.95
    assert policy.per_stage
    assert agent.selectable_policies()[-1].stages == STAGES
    policy.save(tmp_path / "staged")
    assert make_agent("ppo", staged_env, start=tmp_path / "staged").policy().per_stage
    two = gym.make_vec(STAGED, num_envs=2, **{**staged_settings(staged_env), "stages": ["encoder.1"]}).unwrapped
    with pytest.raises(ValueError, match=r"cannot be a start here: its stages is \['first'\]"):
        make_agent("ppo", two, start=tmp_path)


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_start_that_decides_among_few_masks_keeps_them(staged_env, algo, tmp_path):
    policy, core = bold(staged_env, tmp_path), staged_env.core
    few = _reduced(policy, 2, core)
    few.save(tmp_path)
    wanted, came = (walked(core, one)[2] for one in (few, make_agent(algo, staged_env, start=tmp_path).policy()))
    np.testing.assert_array_equal(came, wanted)
    assert (walked(core, policy)[2] != wanted).any()


def test_a_start_that_would_not_decide_as_it_did_is_refused(make_env, tmp_path):
    env = make_env()
    policy = make_agent("ppo", env).policy()
    policy.save(tmp_path / "seeing")
    policy.blind = True
    policy.save(tmp_path / "blind")
    make_agent("blind-ppo", env, start=tmp_path / "blind")
    with pytest.raises(ValueError, match="it was trained blind, and this agent is not"):
        make_agent("ppo", env, start=tmp_path / "blind")
    with pytest.raises(ValueError, match=r"its stages is \['first'\], expected \['first', 'answer'\]"):
        make_agent("ppo", make_env(stages=["first", "answer"]), start=tmp_path / "seeing")
    policy.codebook, policy.blind = torch.tensor([[0] * 7, [1] * 6 + [0]]), False
    policy.save(tmp_path / "reduced")
    make_agent("ppo", env, start=tmp_path / "reduced")
    with pytest.raises(ValueError, match="only among a few masks"):
        make_agent("ppo", make_env(stages=STAGES), start=tmp_path / "reduced")
    policy.noise = "hash"
    policy.save(tmp_path / "mixture")
    with pytest.raises(ValueError, match="only among a few masks"):
        make_agent("ppo", env, start=tmp_path / "mixture")


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_a_run_that_selected_dense_is_a_start_as_it_was_learned(algo, tmp_path):
    trec = "SD/Classification-TREC-Table-v1"
    result = sd_gym.train(trec, "imitation", tmp_path / "first", steps=64, epochs=1, epsilon=1e-4)
    assert result["margin"] == DENSE_MARGIN
    env = gym.make_vec(trec, num_envs=4).unwrapped
    policy = make_agent(algo, env, start=tmp_path / "first").policy()
    assert policy.head.bias.abs().max() < 100
    rows = np.arange(64)
    assert policy.decide(env.core.observe(env.core.split("train"), rows)).any()
