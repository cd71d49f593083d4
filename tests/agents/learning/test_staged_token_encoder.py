"""Policies that read tokens and look again in the middle of the pass: several stages that show tokens."""

import copy
import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.learning.decisions import check_fits, decision_flops
from sd_gym.agents.registry import make_agent
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from stable_baselines3.common.logger import configure
from torch.utils.flop_counter import FlopCounterMode

import sd_gym
from sd_gym.envs import ConfigError
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.envs.spaces import joined
from sd_gym.policy import DecisionPolicy
from tests.agents.conftest import cut_off, leaves, walked
from tests.conftest import sign
from tests.policy.conftest import QUICK, is_negated, orders  # noqa: F401  (a fixture)

CUSTOM = "SD/Classification-Custom-Staged-v0"
STAGES = ["first", "encoder.1"]
LEARNERS = [*QUICK, "blind-ppo", "blind-imitation"]


@pytest.fixture
def keys(reviews, tiny_backbone):
    files = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    return {**files, "stages": STAGES, "observation": "tokens", "max_source_length": 12, "epsilon": 0.5}


@pytest.fixture
def env(keys):
    vector = gym.make_vec(CUSTOM, num_envs=6, **keys).unwrapped
    vector.reset(seed=0)
    return vector


def bold(env, seed=0):
    """A policy that decides on each input differently, by its tokens too."""
    policy = make_agent("ppo", env, seed=seed).policy()
    with torch.no_grad():
        policy.head.weight.normal_(std=8, generator=torch.Generator().manual_seed(seed))
        policy.head.bias.zero_()
    return policy


def test_each_stage_shows_the_tokens_and_what_it_shows_without_them(env, keys):
    pooled = gym.make_vec(CUSTOM, num_envs=6, **{**keys, "observation": "pooled"}).unwrapped
    once = gym.make_vec("SD/Classification-Custom-v0", num_envs=6, **{**keys, "stages": ["first"]}).unwrapped
    seen, _ = env.reset(seed=3)
    alone, _ = once.reset(seed=3)
    shown, _ = pooled.reset(seed=3)
    assert list(seen) == ["mask", "stage", "tokens"]
    assert env.observation_space.contains(seen)
    assert seen["mask"].any()
    np.testing.assert_array_equal(seen["stage"], shown)
    actions = env.action_space.sample()
    later, *_ = env.step(actions)
    shown, *_ = pooled.step(actions)
    assert env.observation_space.contains(later)
    np.testing.assert_array_equal(later["stage"], shown)
    for name, values in alone.items():
        np.testing.assert_array_equal(later[name], values)
        np.testing.assert_array_equal(seen[name], values)
    assert (seen["stage"] != later["stage"]).any()  # what was given is not written over


def test_an_env_is_as_each_of_a_batch_and_as_its_copy(env, keys):
    singles = [gym.make(CUSTOM, **keys).unwrapped for _ in range(6)]
    instances = env.reset(seed=1)[1]["instance"]
    for one, instance in zip(singles, instances, strict=True):
        one.reset(options={"instance": instance})
    env.action_space.seed(0)
    twin, unpickled = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    actions = env.action_space.sample()
    together, *_ = env.step(actions)
    for other in (twin, unpickled):
        for name, values in other.step(actions)[0].items():
            np.testing.assert_array_equal(values, together[name])
    for row, one in enumerate(singles):
        alone, *_ = one.step(actions[row])
        for name, values in alone.items():
            np.testing.assert_allclose(values, together[name][row], atol=1e-5)


def test_the_checkers_and_an_off_the_shelf_ppo_take_it(env, keys):
    one = gym.make(CUSTOM, **keys)
    check_env(one.unwrapped, skip_render_check=True)
    check_sb3_env(one.unwrapped)
    PPO("MultiInputPolicy", SwitchableVecEnv(env), n_steps=8, batch_size=16, seed=0).learn(96)


@pytest.mark.parametrize("algo", LEARNERS)
def test_a_run_is_kept_leaves_and_decides_the_same_again(keys, algo, tmp_path):
    settings = QUICK.get(algo.removeprefix("blind-"), {})
    result = train(CUSTOM, algo, tmp_path / "run", steps=64, **{**keys, **settings})
    _, core, policy = load_run(tmp_path / "run")
    assert (policy.stages, policy.token_width) == (STAGES, 16)
    again = sd_gym.evaluate(CUSTOM, tmp_path / "run")
    for name in ("quality", "flops_ratio_with_policy", "decisions_hash"):
        assert again[name] == result[name]
    leaves(core, tmp_path / "run", result)


@pytest.mark.parametrize("algo", ["ppo_lex", "reinforce"])
def test_a_run_that_was_killed_ends_as_the_uninterrupted_one(keys, algo, tmp_path):
    arguments = {"steps": 900, **keys, **QUICK[algo]}
    sd_gym.train(CUSTOM, algo, tmp_path / "whole", **arguments)
    cut_off(CUSTOM, algo, tmp_path / "cut", **arguments, after=600)
    sd_gym.train(CUSTOM, algo, tmp_path / "cut", **arguments, resume=True)
    whole, cut = ((tmp_path / run / "policy.safetensors").read_bytes() for run in ("whole", "cut"))
    assert whole == cut


def test_a_bold_policy_leaves_and_is_reduced(env, keys, tmp_path):
    """On raw texts, and attached to a model, it decides as in the env."""
    train(CUSTOM, "ppo", tmp_path / "run", steps=32, **keys, confidence=0.5)
    bold(env).save(tmp_path / "run")
    sign(tmp_path / "run")
    _, core, policy = load_run(tmp_path / "run")
    split = core.split("test")
    decisions, _ = core.rollout(split, np.arange(len(split)), policy.decide)
    assert len(np.unique(decisions[:, core.columns[0]], axis=0)) > 1
    leaves(core, tmp_path / "run", {"artefact": "skip_policy.json"})
    model = sd_gym.attach(copy.deepcopy(core.backbone.model), tmp_path / "run")
    model(**split.encoded.inputs(np.arange(len(split)), "cpu"))
    np.testing.assert_array_equal(model.decisions.skip, decisions[:, :-1].astype(bool))
    sd_gym.reduce(tmp_path / "run", 2, tmp_path / "few")
    _, core, few = load_run(tmp_path / "few")
    _, said, _ = walked(core, few)
    for stage, own in enumerate(core.stage_actions.components):
        assert len(np.unique(said[stage][:, own], axis=0)) <= 2


def test_the_tokens_decide_at_all_stages_and_each_row_by_itself(env):
    core, policy = env.core, bold(env)
    seen, said, _ = walked(core, policy)
    for stage, own in enumerate(core.stage_actions.components):
        blank = {name: values * (name == "stage") for name, values in seen[stage].items()}
        assert (policy.decide(blank) != said[stage])[:, own].any()
    parts = [{name: values[:3] for name, values in one.items()} for one in seen]
    apart = np.concatenate([policy.skip_logits(one) for one in parts])
    np.testing.assert_allclose(policy.skip_logits(joined(parts)), apart, atol=1e-4)


def test_the_flops_are_the_counted_ones(env):
    core, split, policy = env.core, env.core.split("train"), bold(env)
    rows = np.arange(len(split))
    own = decision_flops(core, policy, split, rows) - split.costs.head_flops(rows)
    assert len(set(own)) > 1
    np.testing.assert_array_equal(own, [_counted(core, policy, split, row) for row in rows])


def _counted(core, policy, split, row):
    """FLOPs of a policy's networks alone, at all stages."""
    total = []

    def decide(seen):
        with FlopCounterMode(display=False) as counter:
            decisions = policy.decide(seen)
        total.append(counter.get_total_flops())
        return decisions

    core.rollout(split, np.array([row]), decide)
    return sum(total)


@pytest.mark.parametrize("algo", ["ppo", "reinforce", "imitation"])
def test_a_start_on_tokens_decides_as_it_did(env, keys, algo, tmp_path):
    once = gym.make_vec(CUSTOM, num_envs=2, **{**keys, "stages": ["first"]}).unwrapped
    bold(once).save(tmp_path)
    start, core = DecisionPolicy.load(tmp_path), env.core
    split = core.split("train")
    rows = np.arange(len(split))
    came, _ = core.rollout(split, rows, make_agent(algo, env, start=tmp_path).policy().decide)
    np.testing.assert_array_equal(came, start.decide(once.core.observe(split, rows)))
    assert len(np.unique(came, axis=0)) > 1
    pooled = gym.make_vec(CUSTOM, num_envs=2, **{**keys, "observation": "pooled"}).unwrapped
    with pytest.raises(ValueError, match=r"its channels is \d+, expected None; both observe tokens"):
        make_agent(algo, pooled, start=tmp_path)


@pytest.mark.parametrize("algo", ["ppo", "imitation"])
def test_order_is_told(orders, algo, tmp_path, monkeypatch):  # noqa: F811
    """Who skips the first switch loses the texts with "not good" in them, which no bag of words can tell."""
    env = gym.make_vec(CUSTOM, observation="tokens", stages=STAGES, num_envs=32, penalty=3.0, **orders).unwrapped
    split = env.core.split("train")

    def quality(rows, decisions, resume_from=None):
        return 1.0 - (is_negated(split, rows) & (decisions[:, 0] == 1)), np.ones(len(rows))

    monkeypatch.setattr(split.scoring, "quality", quality)
    monkeypatch.setattr(split.scoring, "run", lambda rows, decisions: quality(rows, decisions)[0])
    env.reset(seed=0)
    steps, settings = {
        "ppo": (5000, {"learning_rate": 1e-2, "n_steps": 2, "batch_size": 64}),
        "imitation": (0, {"learning_rate": 1e-2, "batch_size": 16, "epochs": 20}),
    }[algo]
    agent = make_agent(algo, env, seed=0, channels=16, **settings)
    agent.learn(steps, configure(str(tmp_path), []), lambda rollout: None)
    rows = np.arange(len(split))
    skipped, _ = env.core.rollout(split, rows, agent.policy().decide)
    negated = is_negated(split, rows)
    assert skipped[negated, 0].mean() < 0.1
    assert skipped[~negated, 0].mean() > 0.9


def test_what_does_not_fit_is_named(env, keys, tmp_path):
    with pytest.raises(ConfigError, match=r"observation tokens needs the stage first; got \['encoder.1'\]"):
        gym.make(CUSTOM, **{**keys, "stages": ["encoder.1"]})
    policy = bold(env)
    pooled = gym.make_vec(CUSTOM, num_envs=2, **{**keys, "observation": "pooled"}).unwrapped
    with pytest.raises(ValueError, match=r"reads .*\(38,\) and tokens of 16 numbers, but .* has .*\(38,\)$"):
        check_fits(policy, pooled.core)
    with pytest.raises(ValueError, match=r"expected token_width with tokens and several stages"):
        DecisionPolicy(38, policy.nvec, policy.switches, stages=STAGES, channels=4)
    policy.save(tmp_path)
    said = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps({**said, "token_width": 0}))
    with pytest.raises(ValueError, match="token_width: Input should be greater than or equal to 1"):
        DecisionPolicy.load(tmp_path)
