"""A tiny env, and finished runs on it."""

from functools import cache

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.experiment.run import train
from sd_gym.agents.registry import make_agent
from stable_baselines3.common.logger import KVWriter, configure

import sd_gym
from sd_gym.policy import DecisionPolicy
from tests.conftest import CutError, write_reviews

CUSTOM = "SD/Classification-Custom-v0"
STAGED = "SD/Classification-Custom-Staged-v0"
LEARNING = ["ppo", "ppo_lagrangian", "ppo_lex", "a2c", "reinforce"]
SB3 = ["ppo", "ppo_lagrangian", "ppo_lex", "a2c"]
STAGES = ["first", "encoder.1", "encoder.2"]


@pytest.fixture(scope="module")
def custom(tmp_path_factory, tiny_backbone):
    """Settings of a tiny env whose random backbone cannot be broken much: skipping nearly always pays."""
    reviews = write_reviews(tmp_path_factory.mktemp("data") / "reviews.jsonl")
    return {"dataset": str(reviews), "backbone": str(tiny_backbone)}


@pytest.fixture(scope="module")
def finished(custom, tmp_path_factory):
    """The folder of a finished run of an agent, its result, and what was told of its progress: one for all tests.

    A rollout is 64 decisions or fewer, so that there are several validations.
    """

    @cache
    def run(name):
        folder, told = tmp_path_factory.mktemp("runs") / name, []
        result = train(CUSTOM, name, folder, **asked(custom), on_progress=lambda *of_rollout: told.append(of_rollout))
        return folder, result, told

    return run


def cut_off(*arguments, after, **keywords):
    """A run that ends as if killed, at the first rollout with more decisions than ``after``."""

    def kill(step, figures):
        if step > after:
            raise CutError

    with pytest.raises(CutError):
        train(*arguments, **keywords, on_progress=kill)


def asked(custom):
    """What the finished runs were asked for."""
    return {"steps": 640, "seed": 3, **{**custom, "penalty": 3.0, "num_envs": 16}}


@pytest.fixture
def make_env(custom, request):
    """Makes the tiny env, as many envs as the agent under test likes."""

    def make(**settings):
        name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
        size = 16 if name == "reinforce" else 64
        vector = gym.make_vec(CUSTOM, num_envs=size, **custom, **settings).unwrapped
        vector.reset(seed=0)
        return vector

    return make


@pytest.fixture
def env(make_env):
    """Quality is free."""
    return make_env(epsilon=1.0, penalty=1e-6)


def leaves(core, run, result):
    """On raw texts, the run's artefact decides as its policy in the env."""
    assert result["artefact"] == "skip_policy.json"
    split = core.split("test")
    decisions = core.rollout(split, np.arange(len(split)), DecisionPolicy.load(run).decide)[0]
    model = sd_gym.load(run)
    came = model([one.source for one in split.instances])
    sd_gym.detach(model.model)
    np.testing.assert_array_equal([[*one.skip, one.token_level] for one in came], decisions)


def walked(core, policy):
    """What a policy sees at each stage of the training split, what it says there, and what it decides in all."""
    split, seen, said = core.split("train"), [], []

    def decide(observations):
        seen.append(observations)
        said.append(policy.decide(observations))
        return said[-1]

    decisions, _ = core.rollout(split, np.arange(len(split)), decide)
    return seen, said, decisions


@pytest.fixture
def staged_keys(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone), "stages": STAGES, "epsilon": 1.0, "penalty": 1e-6}


@pytest.fixture
def staged_env(staged_keys):
    vector = gym.make_vec(STAGED, num_envs=16, **staged_keys).unwrapped
    vector.reset(seed=0)
    return vector


def learned(env, algo, steps, folder, **settings):
    agent = make_agent(algo, env, seed=0, **settings)
    return agent, learn(agent, steps, folder)


def staged_settings(env):
    config = env.config
    parts = {"data.dataset": config.data.dataset, "backbone.name": config.backbone.name}
    return {**parts, "stages": config.stages, "epsilon": config.reward.epsilon}


def bold(env, folder):
    """A policy that decides on each input differently, at all its stages."""
    policy = make_agent("ppo", env, seed=1).policy()
    with torch.no_grad():
        policy.head.weight.normal_(std=8, generator=torch.Generator().manual_seed(0))
        policy.head.bias.zero_()
    policy.save(folder)
    return policy


class Points(KVWriter):
    """Keeps the points that a logger makes of curves: the step and the values of each."""

    def __init__(self):
        self.points = []

    def write(self, key_values, key_excluded, step=0):
        self.points.append((step, dict(key_values)))

    def close(self):
        pass


def learn(agent, steps, folder):
    rollouts = []
    agent.learn(steps, configure(str(folder), []), rollouts.append)
    return rollouts
