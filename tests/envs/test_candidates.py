"""What may be skipped at all: kinds of sublayers, by the config's key ``candidates``."""

from __future__ import annotations

from typing import get_args

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.learning.agent import NotApplicableError

import sd_gym
from sd_gym.config import CANDIDATES, ConfigError
from sd_gym.policy import DecisionPolicy
from sd_gym.switch.architectures import SublayerKind

MINI = "SD/Classification-Mini-v0"
SMALL = {"train_size": 60, "validation_size": 60, "test_size": 40}


def test_the_config_knows_the_kinds_of_the_runtime():
    """They are written twice: the runtime reads no config, and a config is read without torch."""
    assert get_args(SublayerKind) == CANDIDATES


@pytest.mark.parametrize("kinds", [["attention"], ["feed_forward"], ["attention", "cross_attention"]])
def test_other_sublayers_always_run(kinds):
    """They have one choice, and the others their two."""
    env = gym.make(MINI, candidates=kinds, **SMALL)
    names = env.unwrapped.core.switch_names
    expected = [1 + (name.rpartition(".")[2] in kinds) for name in names]
    assert env.action_space.nvec.tolist() == [*expected, 1]
    env.reset(seed=0)
    most = env.action_space.nvec - 1
    _, _, _, _, info = env.step(most)
    assert info["decision"].tolist() == most.tolist()
    assert 0 < info["flops_ratio"] < 1
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"must be in 0\.\.0"):
        env.step(np.where(most == 0, 1, 0))


def test_the_same_decision_earns_the_same():
    """As with all candidates."""
    every, some = gym.make(MINI, **SMALL), gym.make(MINI, candidates=["feed_forward"], **SMALL)
    decision = some.action_space.nvec - 1
    came = []
    for env in (every, some):
        env.reset(seed=3)
        came.append(env.step(decision)[1:])
    assert came[0][0] == came[1][0]
    assert came[0][3]["quality"] == came[1][3]["quality"]


@pytest.mark.parametrize("algo", ["ppo", "reinforce", "imitation", "every-other"])
def test_agents_skip_candidates_alone(algo, tmp_path):
    """What they learn, saved and loaded, leaves the others running."""
    settings = {"instances": 40, "epochs": 1} if algo == "imitation" else {}
    sd_gym.train(MINI, algo, tmp_path / "run", steps=256, candidates=["attention"], **SMALL, **settings)
    policy = DecisionPolicy.load(tmp_path / "run")
    env = gym.make(MINI, candidates=["attention"], **SMALL)
    core = env.unwrapped.core
    split = core.split("test")
    rows = np.arange(len(split))
    decisions = policy.decide(core.observe(split, rows))
    assert (decisions < core.nvec).all()
    odds = policy.skip_logits(core.observe(split, rows))
    assert (odds[:, core.nvec[:-1] == 1] == -np.inf).all()
    assert np.isfinite(odds[:, core.nvec[:-1] == 2]).all()


def test_tokens_alone():
    """No sublayer is a candidate."""
    env = gym.make(MINI, candidates=[], token_shares=[0.0, 0.5], **SMALL)
    assert set(env.action_space.nvec[:-1]) == {1}
    assert env.action_space.nvec[-1] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"candidates": []}, "only tokens to drop"),
        ({"candidates": ["ffn"]}, "candidates"),
        ({"candidates": ["attention"], "action": "multi_binary"}, "multi_discrete"),
        ({"candidates": ["attention"], "stages": ["first", "middle"]}, r"stages \[first\]"),
    ],
)
def test_what_cannot_be(settings, said):
    """Raises at once, and names the key."""
    with pytest.raises(ConfigError, match=said):
        gym.make(MINI, **settings)


def test_early_exit_does_not_apply(tmp_path):
    """It skips whole layers."""
    with pytest.raises(NotApplicableError, match="candidates"):
        sd_gym.train(MINI, "early-exit", tmp_path / "run", candidates=["attention"], **SMALL)
