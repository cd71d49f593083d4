"""Agents on envs of several stages, from learning to what leaves: what they learn from, keep and decide."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.learning.decisions import outcomes
from sd_gym.agents.registry import agent_class, learning_agents, make_agent
from sd_gym.agents.reinforce.agent import ReinforceAgent
from stable_baselines3.common.logger import Logger
from torch.utils.flop_counter import FlopCounterMode

import sd_gym
from sd_gym.policy import DecisionPolicy
from tests.agents.conftest import STAGES, Points, bold, cut_off, learned, leaves, staged_settings, walked

CUSTOM = "SD/Classification-Custom-Staged-v0"
LEARNING = ["ppo", "a2c", "ppo_lagrangian", "ppo_lex", "reinforce", "blind-ppo"]


@pytest.fixture
def keys(staged_keys):
    return staged_keys


@pytest.fixture
def env(staged_env):
    return staged_env


@pytest.mark.parametrize("algo", LEARNING)
def test_an_agent_learns_to_skip_at_all_stages(env, algo):
    """Quality is free (epsilon 1). Rollouts and points of curves count whole decisions."""
    # A multiplier pays for quality to spare until it has fallen to 0; a fast one does so within these decisions.
    settings = {"multiplier_rate": 0.1} if algo == "ppo_lagrangian" else {}
    agent, rollouts, points = make_agent(algo, env, seed=0, learning_rate=1e-2, entropy=0.0, **settings), [], Points()
    agent.learn(1500, Logger(None, [points]), rollouts.append)
    step, values = points.points[-1]
    assert (step, values["rollout/ep_len_mean"]) == (rollouts[-1].steps, 3)
    assert rollouts[-1].steps >= 1500 > rollouts[-2].steps
    assert all(len(rollout.rewards) == len(rollout.infos["quality"]) for rollout in rollouts)
    if algo != "ppo_lagrangian":  # whose reward is not the env's
        np.testing.assert_allclose(rollouts[0].rewards, 1 - rollouts[0].infos["flops_ratio"], rtol=1e-5)
    core, split = env.core, env.core.split("test")
    policy = agent.policy()
    assert policy.stages == STAGES
    assert outcomes(core, policy, split)["decision"][:, :-1].mean() > 0.8


def test_the_places_of_a_stage_are_those_of_its_switches(reviews, tiny_backbone):
    files = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    keys = {"stages": ["first", "encoder.1"], "token_shares": [0, 0.5]}
    core = gym.make(CUSTOM, **files, **keys).unwrapped.core
    certain, never = 14, 15  # after the logits of six switches and two token levels
    places, logits = core.stage_actions.logit_indices()
    assert logits == certain
    assert places.tolist() == [
        [0, 1, 2, 3, *[certain, never] * 2, 12, 13],
        [4, 5, 6, 7, 8, 9, 10, 11, certain, never],
    ]


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_the_policy_decides_as_the_actor(env, algo, tmp_path):
    agent, _ = learned(env, algo, 64, tmp_path)
    policy, core, split = agent.policy(), env.core, env.core.split("test")
    if algo == "ppo":
        result, own = (
            sd_gym.evaluate(CUSTOM, agent.algorithm, **staged_settings(env)),
            sd_gym.evaluate(CUSTOM, policy, **staged_settings(env)),
        )
        assert {name: result[name] for name in ("quality", "flops_ratio", "skip_rate")} == {
            name: own[name] for name in ("quality", "flops_ratio", "skip_rate")
        }
        assert (result["policy_flops_counted"], own["policy_flops_counted"]) == (False, True)
    env.reset(seed=1, options={"split": "test"})
    rows = env._episodes.rows.copy()
    expected = outcomes(core, policy, split, rows)
    for columns in core.columns:
        chosen = policy.decide(env._episodes.observe())
        action = np.zeros(env.action_space.shape, int)
        action[:, : columns.stop - columns.start] = chosen[:, columns]
        *_, infos = env.step(action)
    final = infos["final_info"]
    np.testing.assert_array_equal(final["decision"], expected["decision"])
    np.testing.assert_array_equal(final["flops_ratio"], expected["flops_ratio"])


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_run_is_kept_evaluated_and_resumed(keys, algo, tmp_path):
    settings = {**keys, "epsilon": 0.5}
    result = train(CUSTOM, algo, tmp_path / "run", steps=200, **settings)
    _, core, policy = load_run(tmp_path / "run")
    assert policy.stages == core.stages == STAGES
    leaves(core, tmp_path / "run", result)
    assert {**sd_gym.evaluate(CUSTOM, tmp_path / "run"), "time": None}.items() >= {
        name: result[name] for name in ("quality", "flops_ratio_with_policy", "skip_rate", "verdict")
    }.items()
    cut_off(CUSTOM, algo, tmp_path / "cut", steps=200, **settings, after=100)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    resumed = train(CUSTOM, algo, tmp_path / "cut", steps=200, **settings, resume=True)
    assert {**resumed, "time": None} == {**result, "time": None}
    weights = [(tmp_path / run / "policy.safetensors").read_bytes() for run in ("run", "cut")]
    assert weights[0] == weights[1]


class Once(ReinforceAgent):
    """An agent that decides before the first layer alone."""

    staged = False


def test_what_decides_once_says_so(env):
    with pytest.raises(ValueError, match=r"this agent decides once.*'encoder.1'") as error:
        Once(env)
    named = str(error.value).rpartition("(")[2].rstrip(")").split(", ")
    assert {*named} == {name for name in learning_agents() if agent_class(name).staged}
    policy = make_agent("ppo", env).policy()
    with pytest.raises(ValueError, match=r"decides at first, encoder.1, encoder.2 needs the components of each stage"):
        policy.reduced(2, np.zeros((1, policy.observation_size), np.float32))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_codebook_of_stages_has_masks_of_each_and_the_most_probable_is_taken(env, size, tmp_path):
    core, policy = env.core, bold(env, tmp_path)
    seen, said, _ = walked(core, policy)
    policy.reduced(size, np.concatenate(seen), core.stage_actions.components).save(tmp_path)
    small = DecisionPolicy.load(tmp_path)
    for stage, own in enumerate(core.stage_actions.components):
        masks = [mask[own] for mask in small.codebook.numpy() if (mask[own] >= 0).all()]
        made = {tuple(one) for one in said[stage][:, own]} | {(0,) * len(own)}
        assert len(made) >= 4
        assert len({tuple(mask) for mask in masks} & made) == len(masks) == min(size, len(made))
        logits = policy(torch.from_numpy(seen[stage]))
        each = [part.log_softmax(dim=1) for part in logits.split(policy.nvec, dim=1)]
        likely = torch.stack([sum(each[at][:, choice] for at, choice in zip(own, mask, strict=True)) for mask in masks])
        expected = np.array(masks)[likely.argmax(dim=0).numpy()]
        np.testing.assert_array_equal(small.decide(seen[stage])[:, own], expected)
        if size == 50:  # all that it says: nothing is lost
            np.testing.assert_array_equal(expected, said[stage][:, own])


def test_the_flops_of_a_codebook_of_stages_are_counted(env, tmp_path):
    policy = bold(env, tmp_path)
    seen, _, _ = walked(env.core, policy)
    small = policy.reduced(3, np.concatenate(seen), env.core.stage_actions.components)
    with FlopCounterMode(display=False) as counter:
        for observations in seen:
            small.decide(observations[:1])
    assert counter.get_total_flops() == small.flops


def test_a_codebook_whose_stages_overlap_is_refused(env, tmp_path):
    policy = bold(env, tmp_path)
    policy.reduced(3, np.concatenate(walked(env.core, policy)[0]), env.core.stage_actions.components).save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    assert description["codebook"][0][-2] == -1  # the last stage's
    description["codebook"][0][-2] = 0
    (tmp_path / "policy.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="share all of their components, or none"):
        DecisionPolicy.load(tmp_path)


def test_hidden_layers_of_a_stage_see_its_rows_alone(env, tmp_path):
    size = env.single_observation_space.shape[0]
    policy = DecisionPolicy(size, env.core.nvec.tolist(), env.core.switch_names, stages=STAGES, per_stage=True)
    policy.save(tmp_path)
    loaded = DecisionPolicy.load(tmp_path)
    seen = torch.randn(12, size)
    seen[:, :3] = torch.eye(3).repeat(4, 1)
    for stage in range(3):
        rows = seen[stage::3]
        assert torch.allclose(loaded(seen)[stage::3], policy.head(policy.body.of_stage[stage](rows)), atol=1e-6)
    assert policy.flops == make_agent("ppo", env).policy().flops
    with pytest.raises(ValueError, match="per_stage=True: expected several stages"):
        DecisionPolicy(size, env.core.nvec.tolist(), env.core.switch_names, per_stage=True)


@pytest.mark.parametrize("algo", ["dense", "every-other", "random", "hash", "static", "oracle", "early-exit"])
def test_controls_run_as_on_one_stage(keys, algo, tmp_path):
    """They look at nothing that a stage shows; hash does, and so decides otherwise."""
    results = [
        train(CUSTOM, algo, tmp_path / str(len(stages)), steps=1, **{**keys, "stages": stages})
        for stages in (STAGES, ["first"])
    ]
    if algo != "hash":
        assert results[0]["skip_rate"] == results[1]["skip_rate"]
        assert results[0]["quality"] == results[1]["quality"]
