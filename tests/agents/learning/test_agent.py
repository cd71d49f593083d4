"""Agents: they learn what is easy to learn, are deterministic, and their artefacts decide as they do."""

import json
from functools import cache
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sd_gym.agents import agent_names, make_agent
from sd_gym.agents.experiment.evaluation import evaluate
from sd_gym.agents.experiment.fronts import front_of
from sd_gym.agents.experiment.run import load_run, split_settings, train
from sd_gym.agents.experiment.selection import MARGINS, Selection
from sd_gym.agents.learning.agent import initial_bias, learning_bias
from sd_gym.agents.learning.decisions import decide_and_score
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sd_gym
from sd_gym.config import ConfigError, RewardConfig
from sd_gym.envs.protocols import Outcome
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.objectives import Objective
from sd_gym.policy import DecisionPolicy
from tests.conftest import write_reviews

CUSTOM = "SD/Classification-Custom-v0"
LEARNING = ["ppo", "ppo_lagrangian", "ppo_lex", "a2c", "reinforce"]
SB3 = ["ppo", "ppo_lagrangian", "ppo_lex", "a2c"]
TAGS = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "rollout/quality",
    "rollout/quality_ref",
    "rollout/flops_ratio",
    "rollout/success_rate",
    "time/fps",
    "validation/quality",
    "validation/flops_ratio",
    "validation/reward",
}


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


def asked(custom):
    """What the finished runs were asked for."""
    return {"steps": 640, "seed": 3, "settings": {**custom, "penalty": 3.0, "num_envs": 16}}


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
    return make_env(epsilon=1.0)


def learn(agent, steps, folder):
    rollouts = []
    agent.learn(steps, configure(str(folder), []), rollouts.append)
    return rollouts


@pytest.mark.parametrize("name", LEARNING)
def test_learns_to_skip_everything_where_quality_is_free(name, env, tmp_path):
    # A multiplier pays for quality to spare until it has fallen to nothing.
    settings = {"multiplier_rate": 0.1} if name.endswith("_lagrangian") else {}
    agent = make_agent(name, env, seed=0, initial_skip_rate=0.3, **settings)
    rollouts = learn(agent, {"reinforce": 1_000}.get(name, 12_000), tmp_path)
    assert rollouts[0].infos["flops_ratio"].mean() > 0.6
    decisions = agent.policy().decide(env.core.observe(env.core.split("train"), np.arange(32)))
    assert decisions[:, :-1].mean() > 0.8  # a few inputs may be left behind


@pytest.mark.parametrize("name", LEARNING)
def test_learns_to_look_at_its_input(name, make_env, tmp_path, monkeypatch):
    """Skipping the first switch is right for one half of the instances and wrong for the other."""
    env = make_env(epsilon=0.0)
    core = env.core
    positive = core.split("train").encoded.labels.numpy().astype(bool)

    def score(split, rows, decisions, seen=None):
        right = (decisions[:, 0] == positive[rows]).astype(float)
        half = np.full(len(rows), 0.5)
        return Outcome(right, np.ones(len(rows)), 1 - right, half)

    monkeypatch.setattr(core, "score", score)
    accuracy = {}
    settings, steps = {"learning_rate": 0.01}, 4_000
    if name == "reinforce":  # of 32 instances no more need be imagined
        settings, steps = {"learning_rate": 0.005, "imagined": 32, "fit_batch": 64}, 5_000
    for variant in (name, f"blind-{name}"):
        agent = make_agent(variant, env, seed=0, **settings)
        learn(agent, steps, tmp_path)
        decisions = agent.policy().decide(core.observe(core.split("train"), np.arange(32)))
        accuracy[variant] = (decisions[:, 0] == positive).mean()
    assert accuracy[name] > 0.9
    assert accuracy[f"blind-{name}"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", LEARNING)
def test_same_seed_same_policy(name, env, tmp_path):
    weights = []
    for seed in (0, 0, 1):
        env.reset(seed=seed)
        agent = make_agent(name, env, seed=seed)
        learn(agent, 500, tmp_path)
        weights.append(agent.policy().head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", [*SB3, "blind-ppo"])
def test_the_exported_policy_decides_as_sb3_does(name, env, tmp_path):
    agent = make_agent(name, env, seed=0, learning_rate=0.01)
    learn(agent, 3_000, tmp_path)
    agent.save_extra(tmp_path)
    agent.policy().save(tmp_path)
    observations = np.random.default_rng(0).normal(size=(200, *env.single_observation_space.shape)).astype(np.float32)
    loaded = make_agent(name, env, seed=1).algorithm
    loaded.policy.load_state_dict(load_file(tmp_path / "sb3.safetensors"))
    seen = np.zeros_like(observations) if name.startswith("blind") else observations
    expected, _ = loaded.predict(seen, deterministic=True)
    np.testing.assert_array_equal(DecisionPolicy.load(tmp_path).decide(observations), expected)


def test_hash_decides_alike_on_the_same_input_and_says_nothing_about_it(env):
    observations = np.random.default_rng(0).normal(size=(400, *env.single_observation_space.shape)).astype(np.float32)
    policy = make_agent("hash", env, rate=0.3).policy()
    decisions = policy.decide(observations)
    order = np.random.default_rng(1).permutation(400)
    np.testing.assert_array_equal(policy.decide(observations[order]), decisions[order])
    np.testing.assert_allclose(decisions[:, :-1].mean(axis=0), 0.3, atol=0.1)


def test_every_other_layer(env):
    observations = env.core.observe(env.core.split("train"), np.arange(4))
    decisions = make_agent("every-other", env).policy().decide(observations)
    assert env.core.backbone.board.names[2].startswith("encoder.1")
    np.testing.assert_array_equal(decisions, np.tile([0, 0, 1, 1, 0, 0, 0], (4, 1)))


def test_controls(env):
    observations = env.core.observe(env.core.split("train"), np.arange(32))
    assert not make_agent("dense", env).policy().decide(observations).any()
    policy = make_agent("random", env, rate=0.3).policy()
    decisions = policy.decide(observations)
    assert 0.15 < decisions[:, :-1].mean() < 0.45
    assert len(np.unique(decisions, axis=0)) > 5
    np.testing.assert_array_equal(policy.decide(observations), decisions)


def test_initial_bias_gives_the_skip_rate():
    bias = initial_bias(np.array([2, 2, 1]), 0.1)
    assert bias.shape == (5,)
    assert bias[:2].softmax(0)[1].item() == pytest.approx(0.1)


def test_learning_begins_at_even_odds_of_switches_and_keeps_most_tokens(custom, tmp_path):
    core = gym.make_vec(CUSTOM, num_envs=1, **custom, token_shares=[0.0, 0.5]).unwrapped.core
    bias = learning_bias(core, 0.5).view(-1, 2).softmax(1)[:, 1]
    assert bias[:-1].tolist() == [0.5] * core.n_switches
    assert bias[-1].item() == pytest.approx(0.1)
    assert learning_bias(core, 0.05).view(-1, 2).softmax(1)[-1, 1].item() == pytest.approx(0.05)
    sd_gym.tabulate(CUSTOM, tmp_path / "table", decisions="random:4", **custom)
    table = gym.make_vec("SD/Table-v0", num_envs=1, table=str(tmp_path / "table")).unwrapped.core
    assert learning_bias(table, 0.5).tolist() == [0.0] * 4  # numbers of masks, none of them a token level


@pytest.mark.parametrize("name", [*LEARNING, "random", "blind-reinforce"])
def test_a_run_folder_is_complete(name, finished, custom):
    folder, result, told = finished(name)
    files = {file.name for file in folder.iterdir()}
    wanted = {"config.json", "policy.json", "policy.safetensors", "result.json", "result.png"}
    assert wanted <= files
    assert ("sb3.safetensors" in files) == (name in SB3)
    assert not any(file.endswith((".tmp", ".pt")) for file in files)
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    config = json.loads((folder / "config.json").read_text())
    assert config["env_config"]["reward"]["penalty"] == 3.0
    assert config["algo"] == name
    assert "torch" in config["versions"]
    if name != "random":
        assert told[-1][0] >= 640
        events = EventAccumulator(str(folder)).Reload()
        assert set(events.Tags()["scalars"]) >= TAGS
    _, core, policy = load_run(folder)
    again = evaluate(core, policy, "test")
    assert again == {key: result[key] for key in again}
    with pytest.raises(FileExistsError, match="finished run"):
        train(CUSTOM, name, folder, steps=10, settings=custom)


@pytest.mark.parametrize(("name", "library"), [("ppo", PPO), ("a2c", A2C)])
def test_the_librarys_own_model_takes_the_parameters(name, library, finished, custom):
    """As docs/agents.md says; the critic's are among them, and no code is run to read them."""
    folder, _, _ = finished(name)
    env = SwitchableVecEnv(gym.make_vec(CUSTOM, num_envs=4, **custom).unwrapped)
    model = library("MlpPolicy", env, n_steps=4)
    parameters = load_file(folder / "sb3.safetensors")
    model.policy.load_state_dict(parameters)
    assert torch.equal(model.policy.value_net.weight, parameters["value_net.weight"])
    observations = env.reset()
    before = model.predict(observations, deterministic=True)[0]
    assert before.shape == (4, *env.action_space.shape)
    model.learn(16)  # and learning goes on from there


class Scripted:
    """Stands for a policy: its loss and FLOPs at each margin are given."""

    def __init__(self, losses, flops, margin=0.0):
        self.losses, self.flops, self.margin = losses, flops, margin

    def with_margin(self, margin):
        return Scripted(self.losses, self.flops, margin)


@pytest.fixture
def scripted_scores(env, monkeypatch):
    """Scripted policies are scored as they say, on halves of 2,000 instances."""

    def score(core, policy, split, rows):
        dense = policy.margin == MARGINS[-1]
        halves = (0, 1) if len(rows) == len(split) else (int(rows[0] > 0),)
        losses = [0 if dense else policy.losses(policy.margin)[half] for half in halves]
        quality = np.concatenate([np.r_[np.zeros(lost), np.ones(2000 - lost)] for lost in losses])
        ratio = 1.0 if dense else policy.flops(policy.margin)
        return {"quality": quality, "quality_ref": 0 * quality + 1, "flops_ratio": 0 * quality + ratio}

    monkeypatch.setattr("sd_gym.agents.experiment.selection.decide_and_score", score)
    monkeypatch.setattr("sd_gym.agents.experiment.selection.by_difficulty", lambda scored, levels: [])
    monkeypatch.setattr(Selection, "_least", lambda self, policy: policy.flops(MARGINS[0]))
    monkeypatch.setattr(env.core, "config", env.core.config.model_copy(update={"reward": RewardConfig(epsilon=0.01)}))
    return env.core


def test_selection_prefers_kept_quality_then_fewer_flops(scripted_scores):
    good = Scripted(lambda margin: (1, 1), lambda margin: 0.5)
    broken = Scripted(lambda margin: (100, 100), lambda margin: 0.2)
    worse = Scripted(lambda margin: (0, 0), lambda margin: 0.6)
    selection, policies = Selection(scripted_scores), (broken, good, worse)
    objective = Objective(scripted_scores.config.reward)
    entries = [selection.consider(step, policy, objective) for step, policy in enumerate(policies)]
    assert [entry["quality_kept"] for entry in entries] == [False, True, True]
    assert selection.select(policies).flops is good.flops


def test_what_cannot_be_the_cheapest_is_not_screened(scripted_scores):
    """Another one is cheaper than it at its boldest."""

    def fail(margin):
        raise AssertionError

    good, dear = Scripted(lambda margin: (1, 1), lambda margin: 0.5), Scripted(fail, lambda margin: 0.6)
    assert Selection(scripted_scores).select([dear, good]).flops is good.flops


def test_a_candidate_that_was_only_lucky_on_the_screening_half_is_not_confirmed(scripted_scores):
    lucky = Scripted(lambda margin: (0, 30), lambda margin: 0.2)
    honest = Scripted(lambda margin: (1, 1), lambda margin: 0.5)
    selection = Selection(scripted_scores, searched=True)
    assert selection.select([lucky, honest]).flops is honest.flops
    only = selection.select([lucky])
    assert only.margin == MARGINS[-1]  # nothing keeps the quality, so everything runs


def test_without_a_search_both_halves_are_one_sample(scripted_scores):
    """What is lost on one half by luck is not held against a policy twice."""
    uneven = Scripted(lambda margin: (12, 2) if margin < 1 else (0, 0), lambda margin: 0.3 + margin / 10)
    assert Selection(scripted_scores).select([uneven]).margin == MARGINS[0]
    assert Selection(scripted_scores, searched=True).select([uneven]).margin == 1.0


def test_a_policy_that_loses_too_much_is_made_more_cautious(scripted_scores):
    bold = Scripted(lambda margin: (20, 20) if margin < 0.5 else (0, 0), lambda margin: 0.3 + margin / 10)
    assert Selection(scripted_scores).select([bold]).margin == 0.5


def test_a_margin_makes_a_policy_skip_less_and_less(env):
    policy = make_agent("random", env, rate=0.4).policy()
    observations = env.core.observe(env.core.split("train"), np.arange(32))
    skipped = [policy.with_margin(margin).decide(observations)[:, :-1] for margin in (0.0, 1.0, 2.0, 9.0)]
    np.testing.assert_array_equal(skipped[0], policy.decide(observations)[:, :-1])
    for bolder, shyer in pairwise(skipped):
        assert (shyer <= bolder).all()
        assert shyer.sum() < bolder.sum()


def test_evaluation_walks_the_split_in_order(env):
    split = env.core.split("train")
    policy = make_agent("random", env).policy()
    scored = decide_and_score(env.core, policy, split)
    rows = np.arange(len(split))
    outcome = env.core.score(split, rows, scored["decision"])
    for name in ("quality", "quality_ref", "flops_ratio"):
        np.testing.assert_array_equal(scored[name], getattr(outcome, name))


def test_names_and_settings_are_checked(env):
    assert "blind-a2c" in agent_names()
    with pytest.raises(ValueError, match=r"unknown agent 'reinforc'; did you mean 'reinforce'"):
        make_agent("reinforc", env)
    with pytest.raises(ValueError, match=r"unknown setting 'learning_rat' of PPOAgent; did you mean 'learning_rate'"):
        make_agent("ppo", env, learning_rat=1)
    with pytest.raises(ValueError, match="greater than 0"):
        make_agent("ppo", env, learning_rate=-1)
    with pytest.raises(ValueError, match=r"unknown setting 'foo'. Of the env: task.*Of ppo: num_envs"):
        split_settings("ppo", {"foo": 1})
    assert split_settings("ppo", {"penalty": 1, "n_steps": 2}) == ({"penalty": 1}, {"n_steps": 2})


def test_a_policy_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no policy.json"):
        DecisionPolicy.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_run(tmp_path)
    with pytest.raises(ConfigError):
        train(CUSTOM, "ppo", tmp_path / "run", steps=10)


@pytest.mark.parametrize("name", [*LEARNING, "blind-ppo"])
def test_a_run_that_was_killed_ends_as_the_uninterrupted_one(name, finished, custom, tmp_path):
    class KilledError(Exception):
        pass

    def kill(step, figures):
        if step > 420:
            raise KilledError

    whole_folder, whole, _ = finished(name)
    arguments, cut = asked(custom), tmp_path / "cut"
    with pytest.raises(KilledError):
        train(CUSTOM, name, cut, **arguments, on_progress=kill)
    with pytest.raises(FileExistsError, match="go on with --resume"):
        train(CUSTOM, name, cut, **arguments)
    with pytest.raises(ValueError, match="its seed is 3, now it is 4"):
        train(CUSTOM, name, cut, **{**arguments, "seed": 4}, resume=True)
    steps = []
    resumed = train(CUSTOM, name, cut, **arguments, resume=True, on_progress=lambda step, figures: steps.append(step))
    assert steps[0] > 320  # the decisions before the checkpoint were not made again
    weights = [(folder / "policy.safetensors").read_bytes() for folder in (whole_folder, cut)]
    assert weights[0] == weights[1]
    assert {**whole, "time": None} == {**resumed, "time": None}


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
    offered = agent.selectable_policies()[-1]  # and, as one of those to select from, cannot end behind it
    assert len(agent.selectable_policies()) == (1 if name == "imitation" else 2)  # which learns anew
    np.testing.assert_array_equal(offered.decide(observations), start.decide(observations))
    assert make_agent(f"blind-{name}", env, start=tmp_path).selectable_policies()[-1].blind
    policy = DecisionPolicy(3, [2, 2], ["a"])
    policy.save(tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be a start here: its observation_size is 3, expected"):
        make_agent(name, env, start=tmp_path / "other")


def test_a_front_is_what_each_policy_reaches_alone(env):
    policies = [make_agent("random", env, rate=rate).policy() for rate in (0.2, 0.6)]
    policies += [policies[0].with_decision(np.zeros(len(env.core.nvec), dtype=int)), policies[1].with_margin(1.0)]
    for policy in policies:
        policy.noise = "none"
    split = env.core.split("validation")
    front = front_of(env.core, split, policies)
    for policy, quality, flops in zip(policies, front.quality, front.flops_ratio, strict=False):
        alone = decide_and_score(env.core, policy, split)
        own = policy.flops / split.costs.dense_flops(np.arange(len(split))) if policy.head.weight.any() else 0
        np.testing.assert_array_equal(quality, alone["quality"])
        np.testing.assert_allclose(flops, alone["flops_ratio"] + own)
    np.testing.assert_array_equal(front.flops_ratio[-1], 1.0)
    assert len(front.quality) == len(policies) + 1
