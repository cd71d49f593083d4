"""Agents on envs of several stages: what they learn from, what they keep, and what it costs."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.experiment.run import load_run, train
from sd_gym.agents.experiment.skip_logits import skip_logits_of_run
from sd_gym.agents.learning.decisions import decide_and_score, decision_flops, score_decisions
from sd_gym.agents.registry import make_agent
from sd_gym.agents.reinforce.agent import ReinforceAgent
from stable_baselines3.common.logger import KVWriter, Logger, configure
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.policy import DecisionPolicy

CUSTOM = "SD/Classification-Custom-Staged-v0"
STAGES = ["first", "encoder.1", "encoder.2"]
LEARNING = ["ppo", "a2c", "ppo_lagrangian", "ppo_lex", "reinforce", "blind-ppo"]
OVER = {"epochs": 100, "batch_size": 8}  # of few instances, imitation needs many passes


@pytest.fixture
def keys(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone), "stages": STAGES, "epsilon": 1.0}


@pytest.fixture
def env(keys):
    vector = gym.make_vec(CUSTOM, num_envs=16, **keys).unwrapped
    vector.reset(seed=0)
    return vector


class Points(KVWriter):
    """Keeps where a logger makes points, and what the last one says."""

    def __init__(self):
        self.steps = []

    def write(self, key_values, key_excluded, step=0):
        self.steps.append(step)
        self.values = dict(key_values)


def learned(env, algo, steps, folder, **settings):
    agent, rollouts = make_agent(algo, env, seed=0, **settings), []
    agent.learn(steps, configure(str(folder), []), rollouts.append)
    return agent, rollouts


@pytest.mark.parametrize("algo", LEARNING)
def test_an_agent_learns_to_skip_at_all_stages(env, algo, tmp_path):
    """Quality is free (epsilon 1). Rollouts and points of curves count whole decisions."""
    # A multiplier pays for quality to spare until it has fallen to 0; a fast one does so within these decisions.
    settings = {"multiplier_rate": 0.1} if algo == "ppo_lagrangian" else {}
    agent, rollouts, points = make_agent(algo, env, seed=0, learning_rate=1e-2, entropy=0.0, **settings), [], Points()
    agent.learn(3000, Logger(None, [points]), rollouts.append)
    assert points.steps[-1] == rollouts[-1].steps
    assert points.values["rollout/ep_len_mean"] == 3
    assert rollouts[-1].steps >= 3000 > rollouts[-2].steps
    assert all(len(rollout.rewards) == len(rollout.infos["quality"]) for rollout in rollouts)
    if algo != "ppo_lagrangian":  # whose reward is not the env's
        np.testing.assert_allclose(rollouts[0].rewards, 1 - rollouts[0].infos["flops_ratio"], rtol=1e-5)
    core, split = env.core, env.core.split("test")
    policy = agent.policy()
    assert policy.stages == STAGES
    assert decide_and_score(core, policy, split)["decision"][:, :-1].mean() > 0.8


def test_only_what_a_stage_decides_is_drawn_and_counts(env):
    core, policy = env.core, make_agent("ppo", env, seed=0).algorithm.policy
    width = env.single_observation_space.shape[0]
    for stage, columns in enumerate(core.columns):
        observations = torch.zeros(64, width)
        observations[:, stage] = 1
        actions, _, log_prob = policy(observations)
        own = columns.stop - columns.start
        assert (actions[:, own:] == 0).all()
        assert actions[:, :own].float().mean() == pytest.approx(0.5, abs=0.1)
        _, again, entropy = policy.evaluate_actions(observations, actions)
        np.testing.assert_allclose(again.detach(), np.log(0.5) * own, rtol=0.05)
        np.testing.assert_allclose(entropy.detach(), -np.log(0.5) * own, rtol=0.05)
        assert torch.equal(again, log_prob)


def test_the_places_of_a_stage_are_those_of_its_switches(reviews, tiny_backbone):
    files = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    keys = {"stages": ["first", "encoder.1"], "token_shares": [0, 0.5]}
    core = gym.make(CUSTOM, **files, **keys).unwrapped.core
    certain, never = 14, 15  # behind the logits of six switches and two token levels
    places, logits = core.steps.of_logits()
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
            sd_gym.evaluate(CUSTOM, agent.algorithm, **_keys(env)),
            sd_gym.evaluate(CUSTOM, policy, **_keys(env)),
        )
        assert {name: result[name] for name in ("quality", "flops_ratio", "skip_rate")} == {
            name: own[name] for name in ("quality", "flops_ratio", "skip_rate")
        }
        assert (result["policy_flops_counted"], own["policy_flops_counted"]) == (False, True)
    env.reset(seed=1, options={"split": "test"})
    rows = env._episodes.rows.copy()
    expected = decide_and_score(core, policy, split, rows)
    for columns in core.columns:
        chosen = policy.decide(env._episodes.observe())
        action = np.zeros(env.action_space.shape, int)
        action[:, : columns.stop - columns.start] = chosen[:, columns]
        *_, infos = env.step(action)
    final = infos["final_info"]
    np.testing.assert_array_equal(final["decision"], expected["decision"])
    np.testing.assert_array_equal(final["flops_ratio"], expected["flops_ratio"])


def _keys(env):
    config = env.config
    parts = {"data.dataset": config.data.dataset, "backbone.name": config.backbone.name}
    return {**parts, "stages": config.stages, "epsilon": config.reward.epsilon}


def test_looking_counts_at_every_stage(env):
    core, split = env.core, env.core.split("test")
    policy, rows = make_agent("dense", env).policy(), np.arange(len(split))
    size, logits = policy.observation_size, int(core.nvec.sum())
    one = 2 * (size * 64 + 64 * 64 + 64 * logits)
    assert policy.flops == 3 * one
    head = split.backbone.flops.costs(split.encoded.source_length)[0]
    np.testing.assert_array_equal(decision_flops(core, policy, split, rows), 3 * one + 2 * head)


def test_a_walk_is_scored_as_its_decisions_are(env):
    core, split = env.core, env.core.split("validation")
    policy = make_agent("ppo", env, seed=3).policy()
    with torch.no_grad():
        policy.head.weight.mul_(100)
    walked = decide_and_score(core, policy, split)
    assert len(np.unique(walked["decision"], axis=0)) > 1
    split.scoring.load_scores(None)
    scored = score_decisions(core, split, np.arange(len(split)), walked["decision"])
    for name, values in walked.items():
        np.testing.assert_allclose(scored[name], values)


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_run_is_kept_evaluated_and_resumed(keys, algo, tmp_path, monkeypatch):
    settings = {**keys, "epsilon": 0.5}
    result = train(CUSTOM, algo, tmp_path / "run", steps=200, settings=settings)
    _, core, policy = load_run(tmp_path / "run")
    assert policy.stages == core.stages == STAGES
    leaves(core, tmp_path / "run", result)
    assert {**sd_gym.evaluate(CUSTOM, tmp_path / "run"), "time": None}.items() >= {
        name: result[name] for name in ("quality", "flops_ratio_with_policy", "skip_rate", "verdict")
    }.items()

    def cut(done, figures):
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CUSTOM, algo, tmp_path / "cut", steps=200, settings=settings, on_progress=cut)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    resumed = train(CUSTOM, algo, tmp_path / "cut", steps=200, settings=settings, resume=True)
    assert {**resumed, "time": None} == {**result, "time": None}
    weights = [(tmp_path / run / "policy.safetensors").read_bytes() for run in ("run", "cut")]
    assert weights[0] == weights[1]


def leaves(core, run, result):
    """On raw texts, the run's artefact decides as its policy in the env."""
    assert result["artefact"] == "skip_policy.json"
    split = core.split("test")
    decisions = core.rollout(split, np.arange(len(split)), DecisionPolicy.load(run).decide)[0]
    model = sd_gym.load(run)
    came = model([one.source for one in split.instances])
    sd_gym.detach(model.model)
    np.testing.assert_array_equal([[*one.skip, one.token_level] for one in came], decisions)


@pytest.mark.parametrize("algo", ["imitation", "blind-imitation"])
def test_imitation_learns_what_is_to_come_at_each_stage(keys, algo, tmp_path):
    """A loss costs little, so nearly all is skipped; another run takes its path over, in stages or at once."""
    settings = {**keys, **OVER, "penalty": 1e-3}
    result = train(CUSTOM, algo, tmp_path / "run", steps=1, settings=settings)
    assert result["last_policy"]["flops_ratio"] < 0.2
    _, core, policy = load_run(tmp_path / "run")
    assert policy.stages == STAGES
    leaves(core, tmp_path / "run", result)
    path = np.array(json.loads((tmp_path / "run" / "masks.json").read_text()))
    for stages in (STAGES, ["first"]):
        other = gym.make_vec(CUSTOM, num_envs=2, **{**keys, "stages": stages}).unwrapped
        agent, _ = learned(other, algo, 1, tmp_path / "log", path=tmp_path / "run", epochs=1)
        np.testing.assert_array_equal(agent.searched.path, path)


class Once(ReinforceAgent):
    """An agent that decides before the first layer alone."""

    staged = False


def test_what_decides_once_says_so(env, tmp_path):
    with pytest.raises(ValueError, match=r"this agent decides once.*'encoder.1'"):
        Once(env)
    policy = make_agent("ppo", env).policy()
    with pytest.raises(ValueError, match=r"decides at first, encoder.1, encoder.2 needs the components of each stage"):
        policy.reduced(2, np.zeros((1, policy.observation_size), np.float32))


def bold(env, folder):
    """A policy that decides on each input differently, at all its stages."""
    policy = make_agent("ppo", env, seed=1).policy()
    with torch.no_grad():
        policy.head.weight.normal_(std=8, generator=torch.Generator().manual_seed(0))
        policy.head.bias.zero_()
    policy.save(folder)
    return policy


def walked(core, policy):
    """What a policy sees at each stage of the training split, what it says there, and what it decides in all."""
    split, seen, said = core.split("train"), [], []

    def decide(observations):
        seen.append(observations)
        said.append(policy.decide(observations))
        return said[-1]

    decisions, _ = core.rollout(split, np.arange(len(split)), decide)
    return seen, said, decisions


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_codebook_of_stages_has_masks_of_each_and_the_most_probable_is_taken(env, size, tmp_path):
    core, policy = env.core, bold(env, tmp_path)
    seen, said, _ = walked(core, policy)
    policy.reduced(size, np.concatenate(seen), core.steps.components).save(tmp_path)
    small = DecisionPolicy.load(tmp_path)
    for stage, own in enumerate(core.steps.components):
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
    small = policy.reduced(3, np.concatenate(seen), env.core.steps.components)
    with FlopCounterMode(display=False) as counter:
        for observations in seen:
            small.decide(observations[:1])
    assert counter.get_total_flops() == small.flops


def test_a_codebook_whose_stages_overlap_is_refused(env, tmp_path):
    policy = bold(env, tmp_path)
    policy.reduced(3, np.concatenate(walked(env.core, policy)[0]), env.core.steps.components).save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    assert description["codebook"][0][-2] == -1  # the last stage's
    description["codebook"][0][-2] = 0
    (tmp_path / "policy.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="of the same components, or of different stages"):
        DecisionPolicy.load(tmp_path)


@pytest.mark.parametrize("stages", [STAGES, ["encoder.1"]])
def test_a_run_of_stages_is_reduced_and_its_artefact_decides_so(env, stages, tmp_path):
    keys = {**_keys(env), "stages": stages}
    train(CUSTOM, "ppo", tmp_path / "run", steps=32, settings=keys, strictness=0)
    bold(gym.make_vec(CUSTOM, num_envs=2, **keys).unwrapped, tmp_path / "run")
    sd_gym.reduce(tmp_path / "run", 2, tmp_path / "few")
    _, core, policy = load_run(tmp_path / "few")
    _, said, decisions = walked(core, policy)
    for stage, own in enumerate(core.steps.components):
        assert len(np.unique(said[stage][:, own], axis=0)) <= 2
    assert len(np.unique(decisions, axis=0)) > 1
    model = sd_gym.load(tmp_path / "few")
    answers = model([one.source for one in core.split("train").instances])
    np.testing.assert_array_equal([one.skip for one in answers], decisions[:, :-1])
    sd_gym.detach(model.model)


@pytest.mark.parametrize("stages", [STAGES, ["encoder.1"]])
def test_a_backbone_is_tuned_under_what_each_stage_decides(env, stages, tmp_path):
    """The odds have the sign of the decisions; of what no stage decides, they say that it runs."""
    keys = {**_keys(env), "stages": stages}
    train(CUSTOM, "ppo", tmp_path / "run", steps=32, settings=keys, strictness=0)
    policy = bold(gym.make_vec(CUSTOM, num_envs=2, **keys).unwrapped, tmp_path / "run")
    _, odds = skip_logits_of_run(tmp_path / "run", {})
    core = load_run(tmp_path / "run")[1]
    seen, _, decisions = walked(core, policy)
    np.testing.assert_array_equal(odds["train"] > 0, decisions[:, :-1].astype(bool))
    for columns, observations in zip(core.columns, seen, strict=True):
        np.testing.assert_array_equal(odds["train"][:, columns], policy.skip_logits(observations)[:, columns])
    assert (odds["train"][:, : core.columns[0].start] == -np.inf).all()
    options = ["--policy", tmp_path / "run", "--output", tmp_path / "tuned", "--steps", 3]
    result = CliRunner().invoke(app, ["prepare", *map(str, options)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_start_of_one_stage_decides_nearly_as_it_did(env, algo, tmp_path):
    """At the first stage exactly; what it said of later switches is learned from what those stages see."""
    once = gym.make_vec(CUSTOM, num_envs=2, **{**_keys(env), "stages": ["first"]}).unwrapped
    start = make_agent("ppo", once, seed=1).policy()
    with torch.no_grad():
        start.head.weight.mul_(100)
    start.save(tmp_path)
    agent = make_agent(algo, env, start=tmp_path)
    policy, core = agent.policy(), env.core
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
    assert make_agent("ppo", env, start=tmp_path / "staged").policy().per_stage
    two = gym.make_vec(CUSTOM, num_envs=2, **{**_keys(env), "stages": ["encoder.1"]}).unwrapped
    with pytest.raises(ValueError, match=r"cannot be a start here: its stages is \['first'\]"):
        make_agent("ppo", two, start=tmp_path)


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
    with pytest.raises(ValueError, match="per_stage=True gives each of several stages hidden layers"):
        DecisionPolicy(size, env.core.nvec.tolist(), env.core.switch_names, per_stage=True)


@pytest.mark.parametrize("algo", ["dense", "every-other", "random", "hash", "static", "oracle", "early-exit"])
def test_controls_run_as_on_one_stage(keys, algo, tmp_path):
    """They look at nothing that a stage shows; hash does, and so decides otherwise."""
    results = [
        train(CUSTOM, algo, tmp_path / str(len(stages)), steps=1, settings={**keys, "stages": stages})
        for stages in (STAGES, ["first"])
    ]
    if algo != "hash":
        assert results[0]["skip_rate"] == results[1]["skip_rate"]
        assert results[0]["quality"] == results[1]["quality"]


def test_reinforce_waits_for_its_foresight_but_learns_in_short_runs_too(env, tmp_path):
    agent = make_agent("reinforce", env, seed=0)
    first, moved = agent.policy().head.bias, []

    def on_rollout(rollout):
        moved.append(not torch.equal(agent.policy().head.bias, first))

    agent.learn(256, configure(str(tmp_path), []), on_rollout)  # rollouts of 32 decisions; it waits for a quarter
    assert moved == [False] * 2 + [True] * 6
