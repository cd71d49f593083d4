"""Policies that read the tokens in their order, where order decides and a bag of words cannot tell."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents import make_agent
from sd_gym.agents.experiment.evaluation import evaluate
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.learning.decisions import check_fits, decision_flops
from stable_baselines3.common.logger import configure
from torch.utils.flop_counter import FlopCounterMode

import sd_gym
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.observations import to_tensors
from sd_gym.policy.token_encoder import TokenEncoder, affordable_channels
from tests.agents.conftest import cut_off
from tests.envs.conftest import SMALL
from tests.policy.conftest import QUICK, is_negated

ENV = "SD/Classification-Custom-v0"


def learned(agent, orders, folder, steps, monkeypatch, observation="tokens", **settings):
    """A policy for an env where who skips the first switch loses the texts that have "not good" in them, and no others.

    Returns:
        Which texts of the training split it skips that switch for, and which of them have it.
    """
    env = gym.make_vec(ENV, observation=observation, num_envs=32, penalty=3.0, **orders).unwrapped
    split = env.core.split("train")

    def quality(rows, decisions, resume_from=None):
        lost = is_negated(split, rows) & (decisions[:, 0] == 1)
        return 1.0 - lost, np.ones(len(rows))

    monkeypatch.setattr(split.scoring, "quality", quality)
    monkeypatch.setattr(split.scoring, "run", lambda rows, decisions: quality(rows, decisions)[0])

    def path_losses(split, rows, path, on_round):
        return 1 - np.stack([quality(rows, np.tile(mask, (len(rows), 1)))[0] for mask in path], axis=1)

    monkeypatch.setattr("sd_gym.agents.imitation.agent.path_losses", path_losses)
    env.reset(seed=0)
    agent = make_agent(agent, env, seed=0, **settings)
    agent.learn(steps, configure(str(folder), []), lambda rollout: None)
    rows = np.arange(len(split))
    return agent.policy().decide(env.core.observe(split, rows))[:, 0], is_negated(split, rows)


LEARNERS = {
    "ppo": (5000, {"learning_rate": 1e-2, "n_steps": 2, "batch_size": 64}),
    "imitation": (0, {"learning_rate": 1e-2, "batch_size": 16}),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_who_sees_tokens_learns_what_a_bag_of_words_cannot_tell(name, orders, tmp_path, monkeypatch):
    steps, settings = LEARNERS[name]
    skipped, negated = learned(name, orders, tmp_path, steps, monkeypatch, channels=16, **settings)
    assert skipped[negated].mean() < 0.1
    assert skipped[~negated].mean() > 0.9


def test_who_sees_a_bag_of_words_decides_alike_on_all_its_orders(orders, tmp_path, monkeypatch):
    core = gym.make(ENV, **orders).unwrapped.core
    seen = core.observe(core.split("train"), np.arange(len(core.split("train"))))
    np.testing.assert_allclose(seen, np.tile(seen[0], (len(seen), 1)), atol=1e-4)
    skipped, _ = learned("imitation", orders, tmp_path, 0, monkeypatch, observation="pooled")
    assert len(np.unique(skipped)) == 1


@pytest.mark.parametrize("name", [*QUICK, "blind-ppo", "static"])
def test_a_run_on_tokens_is_saved_and_decides_the_same_again(name, orders, tmp_path):
    settings = {"observation": "tokens", **QUICK.get(name, {})}
    result = sd_gym.train(ENV, name, tmp_path / "run", steps=64, **orders, **settings)
    _, core, policy = load_run(tmp_path / "run")
    again = evaluate(core, policy, "test")
    for key in ("quality", "flops_ratio_with_policy", "decisions_hash"):
        assert again[key] == result[key]
    assert result["artefact"] is not None or name == "static"
    assert policy.blind == (name in ("blind-ppo", "static"))


@pytest.mark.parametrize("name", ["ppo", "ppo_lex", "reinforce"])
def test_what_an_agent_exports_decides_as_it_does(name, orders):
    env = gym.make_vec(ENV, observation="tokens", **orders, num_envs=4).unwrapped
    env.reset(seed=0)
    agent = make_agent(name, env, seed=0)
    seen = env.core.observe(env.core.split("train"), np.arange(40))
    with torch.no_grad():
        if name == "reinforce":
            logits = agent.network(to_tensors(seen))
        else:
            logits = agent.algorithm.policy.get_distribution(to_tensors(seen)).distribution
            logits = torch.cat([one.logits for one in logits], dim=1)
        exported = agent.policy()(to_tensors(seen))
    parts = [one.log_softmax(dim=1) for one in exported.split(env.core.nvec.tolist(), dim=1)]
    expected = [one.log_softmax(dim=1) for one in logits.split(env.core.nvec.tolist(), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), torch.cat(expected, dim=1))


@pytest.mark.parametrize("name", ["ppo_lex", "reinforce"])
def test_a_run_on_tokens_that_was_killed_ends_as_the_uninterrupted_one(name, orders, tmp_path):
    arguments = {"steps": 900, **orders, "observation": "tokens", **QUICK[name]}
    sd_gym.train(ENV, name, tmp_path / "whole", **arguments)
    cut_off(ENV, name, tmp_path / "cut", **arguments, after=600)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    sd_gym.train(ENV, name, tmp_path / "cut", **arguments, resume=True)
    whole, cut = ((tmp_path / run / "policy.safetensors").read_bytes() for run in ("whole", "cut"))
    assert whole == cut


def policy_of(core, channels=5, **kwargs):
    torch.manual_seed(0)
    policy = DecisionPolicy(16, core.nvec.tolist(), core.backbone.board.names, channels=channels, **kwargs).eval()
    with torch.no_grad():
        policy.head.weight.mul_(20)
    return policy


@pytest.fixture
def tiny(reviews, tiny_backbone):
    files = {"dataset": str(reviews), "backbone": str(tiny_backbone), "max_source_length": 12}
    return gym.make(ENV, observation="tokens", **files).unwrapped.core


def test_the_flops_of_a_policy_grow_with_its_text_and_are_the_counted_ones(tiny):
    policy, split = policy_of(tiny), tiny.split("train")
    rows = np.arange(len(split))
    counted = []
    for row in rows:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            policy(to_tensors(tiny.observe(split, rows[[row]])))
        counted.append(counter.get_total_flops())
    np.testing.assert_array_equal(decision_flops(tiny, policy, split, rows), counted)
    assert len(set(counted)) > 1
    blind = policy_of(tiny, blind=True)
    np.testing.assert_array_equal(decision_flops(tiny, blind, split, rows), blind.flops)


@pytest.mark.parametrize("env_id", ["SD/Classification-Mini-v0", "SD/Summarization-Mini-v0"])
def test_token_encoders_cost_at_most_one_percent_of_the_dense_flops(env_id):
    env = gym.make_vec(env_id, num_envs=2, observation="tokens", **SMALL).unwrapped
    policy, split = make_agent("ppo", env).policy(), env.core.split("train")
    rows = np.arange(len(split))
    encoder = policy.flops_per_token * split.encoded.source_length / split.costs.dense_flops(rows)
    assert 0.005 < encoder.mean() < 0.0101


def test_channels_are_as_many_as_can_be_paid():
    assert affordable_channels(384, 1e9) == 48
    assert affordable_channels(8, 1.0) == 1
    assert affordable_channels(128, 2 * 3 * 128 * 20 * 100) == 20


def test_a_batch_of_texts_is_each_alone_and_padding_is_not_seen(tiny):
    policy, split = policy_of(tiny), tiny.split("train")
    seen = to_tensors(tiny.observe(split, np.arange(len(split))))
    with torch.no_grad():
        together = policy(seen)
        alone = [policy({name: values[[row]] for name, values in seen.items()}) for row in range(len(split))]
    torch.testing.assert_close(together, torch.cat(alone))
    longer = {name: torch.cat([values, torch.zeros_like(values)], dim=1) for name, values in seen.items()}
    with torch.no_grad():
        torch.testing.assert_close(policy(longer), together)


def test_a_token_encoder_sees_the_order_and_nothing_where_there_is_nothing():
    torch.manual_seed(0)
    encoder, tokens = TokenEncoder(4, 8), torch.randn(1, 5, 4)
    mask = torch.ones(1, 5, dtype=torch.int8)
    forward, backward = (encoder({"tokens": one, "mask": mask}) for one in (tokens, tokens.flip(1)))
    assert (forward - backward).abs().max() > 0.01
    assert not encoder({"tokens": tokens * 0, "mask": mask * 0}).any()


def test_versions_of_a_policy_keep_its_token_encoder(tiny, tmp_path):
    policy, split = policy_of(tiny), tiny.split("train")
    seen = tiny.observe(split, np.arange(len(split)))
    policy.save(tmp_path)
    np.testing.assert_array_equal(DecisionPolicy.load(tmp_path).decide(seen), policy.decide(seen))
    assert policy.with_margin(1000.0).decide(seen).sum() == 0
    assert len(np.unique(policy.reduced(2, seen).decide(seen), axis=0)) <= 2
    assert policy.skip_logits(seen).shape == (len(split), tiny.n_switches)
    hashed = policy_of(tiny, noise="hash")
    first = {name: values[:1] for name, values in seen.items()}
    np.testing.assert_array_equal(hashed.decide(first), hashed.decide(seen)[:1])


def test_a_policy_of_another_observation_is_refused(tiny, reviews, tiny_backbone):
    pooled = gym.make(ENV, dataset=str(reviews), backbone=str(tiny_backbone)).unwrapped.core
    with pytest.raises(ValueError, match=r"reads tokens of 16 numbers, but .* has observations of shape \(34,\)"):
        check_fits(policy_of(tiny), pooled)
    with pytest.raises(ValueError, match=r"reads observations of shape \(16,\), but .* has tokens of 16 numbers"):
        check_fits(policy_of(tiny, channels=None), tiny)
