"""A user's own agents and networks, without a fork: used by name and saved with a run; errors name what is missing."""

import json
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sd_gym.agents import AgentSettings, PrivilegedAgent, Rollout, agent_names, make_agent, register_agent
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.learning.decisions import SplitDecisions, Version
from sd_gym.agents.ppo.agent import PPOAgent
from sd_gym.agents.runs.finished_runs import finished_runs
from stable_baselines3.common.logger import configure
from torch import nn

import sd_gym
from sd_gym.envs import ConfigError
from sd_gym.policy import DecisionPolicy
from sd_gym.registration import import_own
from sd_gym.registry import Registry, UnknownNameError
from tests.agents.conftest import cut_off
from tests.conftest import forget_own

pytestmark = pytest.mark.usefixtures("own_names")
CUSTOM = "SD/Classification-Custom-v0"


@pytest.fixture
def env(custom):
    vector = gym.make_vec(CUSTOM, num_envs=64, epsilon=1.0, **custom).unwrapped
    vector.reset(seed=0)
    return vector


def observations_of(env, n=64):
    size = env.single_observation_space.shape
    return np.random.default_rng(0).normal(size=(n, *size)).astype(np.float32)


# --- objectives ---


def stingy(quality, quality_ref, flops_ratio, **constants):
    return quality - quality_ref - constants["penalty"] * flops_ratio


def test_a_run_with_an_own_objective_is_evaluated_by_anybody_but_resumed_only_with_it(custom, tmp_path):
    sd_gym.register_objective("stingy", stingy)
    settings = {**custom, "objective": "stingy", "num_envs": 16}
    result = train(CUSTOM, "a2c", tmp_path / "done", steps=64, **settings)
    assert result["return"] == pytest.approx(result["quality_difference"] - 20 * result["flops_ratio"])
    assert sd_gym.evaluate(CUSTOM, tmp_path / "done")["return"] == result["return"]
    cut_off(CUSTOM, "a2c", tmp_path / "cut", steps=640, **settings, imports=["my_things"], after=320)
    forget_own()
    evaluated = sd_gym.evaluate(CUSTOM, tmp_path / "done")
    assert (evaluated["instances"], evaluated["return"]) == (4, None)  # nobody here knows what it was
    with pytest.raises(ConfigError, match=r"unknown objective 'stingy'.*cut was made with --import my_things"):
        train(CUSTOM, "a2c", tmp_path / "cut", steps=640, **settings, resume=True)


# --- networks ---


class Convolution(nn.Module):
    """Reads the observation as a line; has buffers, dropout and two names for one weight."""

    def __init__(self, observation_size, n_logits):
        super().__init__()
        self.scan = nn.Conv1d(1, 3, kernel_size=3)
        self.norm = nn.LayerNorm(observation_size - 2)
        self.out = nn.Linear(3 * (observation_size - 2), n_logits)
        self.same = self.out
        self.drop = nn.Dropout(0.1)

    def forward(self, observations):
        return self.out(self.drop(self.norm(self.scan(observations[:, None])).relu().flatten(1)))


@pytest.mark.parametrize("name", ["ppo", "ppo_lex", "a2c", "blind-ppo", "reinforce", "imitation"])
def test_an_own_network_learns_and_is_saved_with_its_agent(name, env, tmp_path):
    sd_gym.register_network("convolution", Convolution)
    epochs = {"epochs": 3} if name == "imitation" else {}
    agent = make_agent(name, env, seed=0, learning_rate=0.01, network="convolution", **epochs)
    before = agent.policy().state_dict()
    agent.learn(2_000, configure(str(tmp_path), []), lambda rollout: None)
    policy = agent.policy()
    assert isinstance(policy.body, Convolution)
    assert not torch.equal(policy.body.out.bias, before["body.out.bias"])
    policy.save(tmp_path)
    observations = observations_of(env)
    decisions = DecisionPolicy.load(tmp_path).decide(observations)
    np.testing.assert_array_equal(decisions, policy.decide(observations))
    if isinstance(agent, PPOAgent) or name == "a2c":  # and as the library itself
        agent.save_extra(tmp_path)
        loaded = make_agent(name, env, seed=1, network="convolution").algorithm
        loaded.policy.load_state_dict(load_file(tmp_path / "sb3.safetensors"))
        seen = np.zeros_like(observations) if name.startswith("blind") else observations
        np.testing.assert_array_equal(loaded.predict(seen, deterministic=True)[0], decisions)


def test_learning_with_an_own_network_begins_at_the_skip_rate(env):
    sd_gym.register_network("silent", lambda size, n: nn.Sequential(nn.Linear(size, n), nn.Threshold(1e9, 0.0)))
    for name in ("ppo", "reinforce", "imitation"):
        policy = make_agent(name, env, network="silent", initial_skip_rate=0.3).policy()
        odds = policy.skip_logits(observations_of(env, 3))
        np.testing.assert_allclose(1 / (1 + np.exp(-odds)), 0.3, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 2**31))
def test_a_margin_and_a_decision_act_on_the_logits_of_any_network(margin, seed):
    torch.manual_seed(seed)
    registered = Registry("network", {})
    registered.register("convolution", Convolution)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sd_gym.policy.networks.NETWORKS", registered)
        policy = DecisionPolicy(6, [2, 2, 3], ["a", "b"], network="convolution").eval()
    observations = np.random.default_rng(seed).normal(size=(50, 6)).astype(np.float32)
    odds = policy.skip_logits(observations)
    clear = (abs(odds - margin) > 1e-5).all(axis=1)
    decided = policy.with_margin(margin).decide(observations)
    np.testing.assert_array_equal(decided[clear, :2], odds[clear] > margin)


def test_flops_of_a_decision_are_exact_for_any_network():
    default = DecisionPolicy(10, [2, 2, 1], ["a", "b"])
    assert default.flops == 2 * (10 * 64 + 64 * 64 + 64 * 5)

    class Recurrent(nn.Module):
        def __init__(self, size, n):
            super().__init__()
            self.lstm = nn.LSTM(1, 4, batch_first=True)
            self.mix = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.out = nn.Linear(4, n)

        def forward(self, observations):
            return self.out(self.mix(self.lstm(observations[..., None])[0]).mean(dim=1))

    sd_gym.register_network("convolution", Convolution)
    sd_gym.register_network("recurrent", Recurrent)
    convolution = DecisionPolicy(10, [2, 2, 1], ["a", "b"], network="convolution")
    assert convolution.flops == 2 * (8 * 3 * 3 + 3 * 8 * 5)
    recurrent = DecisionPolicy(10, [2, 2, 1], ["a", "b"], network="recurrent").eval()
    lstm, attention, feed_forward = 10 * 16 * (1 + 4), 10 * (4 * 4 * 4) + 2 * 10 * 10 * 4, 2 * 10 * 4 * 8
    assert recurrent.flops == 2 * (lstm + attention + feed_forward + 4 * 5)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda size, n: nn.Linear(size, n + 1), r"logits \[n, 13\]; for 2 observations it returned \[2, 14\]"),
        (
            lambda size, n: nn.Linear(size + 1, n),
            r"expected a module from observations \[n, \d+\] .* counted on 'meta'",
        ),
        (lambda size, n: nn.LSTM(size, n), "for 2 observations it returned tuple"),
        (lambda size, n: "mlp", "got str"),
    ],
)
def test_a_network_that_is_none(factory, message, env):
    sd_gym.register_network("broken", factory)
    with pytest.raises(ValueError, match=message):
        make_agent("ppo", env, network="broken")
    with pytest.raises(UnknownNameError, match="unknown network 'brokn'; did you mean 'broken'"):
        make_agent("reinforce", env, network="brokn")


def test_a_run_whose_network_is_missing_says_what_to_import_and_imports_nothing(custom, tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text("raise SystemExit('imported by itself')\n")
    monkeypatch.syspath_prepend(tmp_path)
    sd_gym.register_network("convolution", Convolution)
    arguments = {"steps": 64, **{**custom, "network": "convolution"}, "imports": ["my_net"]}
    train(CUSTOM, "a2c", tmp_path / "run", **arguments)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["imports"] == ["my_net"]
    load_run(tmp_path / "run")
    forget_own()
    message = r"unknown network 'convolution'.*run was made with --import my_net; pass that again"
    with pytest.raises(UnknownNameError, match=message):
        load_run(tmp_path / "run")
    with pytest.raises(UnknownNameError, match=message):
        train(CUSTOM, "ppo", tmp_path / "warm", steps=64, **{**custom, "start": str(tmp_path / "run")})
    description = json.loads((tmp_path / "run" / "policy.json").read_text())
    (tmp_path / "run" / "policy.json").write_text(json.dumps({**description, "network": "os:system"}))
    with pytest.raises(UnknownNameError, match="unknown network 'os:system'"):
        load_run(tmp_path / "run")


def test_a_warm_start_needs_the_same_network(env, tmp_path):
    sd_gym.register_network("convolution", Convolution)
    make_agent("ppo", env, network="convolution").policy().save(tmp_path)
    agent = make_agent("reinforce", env, network="convolution", start=tmp_path)
    observations = observations_of(env)
    np.testing.assert_array_equal(
        agent.policy().decide(observations), DecisionPolicy.load(tmp_path).decide(observations)
    )
    with pytest.raises(ValueError, match="its network is convolution, expected None"):
        make_agent("ppo", env, start=tmp_path)


# --- agents ---


@pytest.fixture
def gradient():
    import_own("examples/own_agent.py")
    return sys.modules["own_agent"].Gradient


def test_an_own_agent_is_one_by_name(gradient, env):
    assert {"gradient", "blind-gradient"} <= set(agent_names())
    assert make_agent("blind-gradient", env, learning_rate=0.1).policy().blind
    with pytest.raises(ValueError, match=r"unknown setting 'learning_rat' of Gradient; did you mean 'learning_rate'"):
        make_agent("gradient", env, learning_rat=0.1)
    register_agent("control", type("Control", (gradient,), {"is_control": True}))
    assert "control" in agent_names()
    assert "blind-control" not in agent_names()
    for name, why in (
        ("ppo", "'ppo' is taken"),
        ("blind-mine", "blind-NAME is the agent NAME with zeroed observations"),
    ):
        with pytest.raises(ValueError, match=why):
            register_agent(name, gradient)
    with pytest.raises(TypeError, match="has to be a subclass of"):
        register_agent("network", Convolution)


class Halves(PrivilegedAgent):
    """Half of the instances, as they come, skip the first switch; to know so costs a FLOP."""

    def learn(self, total_steps, logger, on_rollout):
        on_rollout(Rollout(total_steps, np.zeros(0), {}))

    selects = False

    def operating_points(self):
        return [Version(self)]

    def decide_split(self, split, rows):
        decisions = np.zeros((len(rows), len(self.env.core.nvec)), dtype=int)
        decisions[rows % 2 == 0, 0] = 1
        return SplitDecisions(decisions, np.ones(len(rows)))


def test_what_decides_by_more_than_the_observation_is_evaluated_beside_agents(custom, env, tmp_path):
    register_agent("halves", Halves)
    assert "halves" in agent_names()
    assert "blind-halves" not in agent_names()  # it does not look
    with pytest.raises(TypeError, match=r"abstract method '?operating_points"):
        type("Nothing", (PrivilegedAgent,), {"learn": Halves.learn})(env)
    told, run = [], tmp_path / "run"
    result = train(CUSTOM, "halves", run, steps=64, **custom, on_progress=lambda *args: told.append(args))
    assert told == [(64, {})]
    assert result["decisions_used"] == 2
    assert next(iter(result["skip_rate"].values())) == pytest.approx(0.5, abs=0.1)
    assert result["flops_ratio"] < result["flops_ratio_with_policy"] < result["flops_ratio"] + 1e-3
    assert (result["time"], result["history"], result["last_policy"]) == ({}, [], None)
    assert (result["selection"], result["guarantee"]) == (None, None)
    assert (run / "instances.csv").exists()
    assert not {"policy.json", "skip_policy.json", "checkpoint.pt"} & {file.name for file in run.iterdir()}
    assert finished_runs([run])[0].result["quality"] == result["quality"]


@pytest.mark.parametrize("name", ["gradient", "a2c", "reinforce"])
def test_a_killed_run_of_a_users_agent_ends_as_the_uninterrupted_one(name, gradient, custom, tmp_path):
    sd_gym.register_network("convolution", Convolution)
    own = {} if name == "gradient" else {"network": "convolution"}
    arguments = {"steps": 1_000, "seed": 3, **{**custom, **own, "num_envs": 16}, "imports": ["mine.py"]}
    whole = train(CUSTOM, name, tmp_path / "whole", **arguments)
    cut_off(CUSTOM, name, tmp_path / "cut", **arguments, after=700)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    forget_own()
    missing = "network 'convolution'" if own else "agent 'gradient'"
    message = rf"unknown {missing}.*cut was made with --import mine\.py; pass that again"
    with pytest.raises(UnknownNameError, match=message):
        train(CUSTOM, name, tmp_path / "cut", **arguments, resume=True)
    sd_gym.register_agent("gradient", gradient)
    sd_gym.register_network("convolution", Convolution)
    resumed = train(CUSTOM, name, tmp_path / "cut", **arguments, resume=True)
    weights = [(tmp_path / run / "policy.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert {**whole, "time": None} == {**resumed, "time": None}


def test_a_setting_with_the_name_of_a_key_of_the_env_is_refused():
    class Greedy(Halves):
        class Settings(AgentSettings):
            epsilon: float = 0.1  # of exploration; the env's is the quality that may be lost

    with pytest.raises(ValueError, match="its setting 'epsilon' is a key of the env"):
        register_agent("greedy", Greedy)
