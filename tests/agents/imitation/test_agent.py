"""Imitation: a policy that learns the exchange rates of FLOPs and risk along a path of masks."""

import json
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.baselines.search import path_losses
from sd_gym.agents.baselines.static import MASKS
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.registry import make_agent
from stable_baselines3.common.logger import configure

from tests.agents.conftest import STAGED, STAGES, learned, leaves

CUSTOM = "SD/Classification-Custom-v0"
OVER = {"epochs": 25, "batch_size": 8}  # of few instances, imitation needs many passes


@pytest.fixture
def custom(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone), "penalty": 2.0}


@pytest.fixture
def env(custom):
    vector = gym.make_vec(CUSTOM, num_envs=8, **custom).unwrapped
    vector.reset(seed=0)
    return vector


def test_what_is_learned_is_worth_more_than_any_mask_of_the_path(env, tmp_path):
    agent = make_agent("imitation", env, epochs=200, learning_rate=0.01, weight_decay=0.0)
    agent.learn(1, configure(str(tmp_path), []), lambda rollout: None)
    split = env.core.split("train")
    path, rows = agent.path, np.arange(len(split))
    lost = path_losses(split, rows, path)
    assert lost.min() < 0 < lost.max()  # gains count
    assert not path[0].any()
    assert all(np.abs(after - before).sum() == 1 for before, after in pairwise(path))

    flops = np.stack([split.costs.flops_ratio(rows, np.tile(mask, (len(rows), 1))) for mask in path], axis=1)
    decided = agent.policy().decide(env.core.observe(split, rows))
    outcome = env.core.score(split, rows, decided)
    price = outcome.flops_ratio + 2.0 * (outcome.quality_ref - outcome.quality)
    assert price.mean() < (flops + 2.0 * lost).mean(axis=0).min()
    assert len(np.unique(decided, axis=0)) > 1


def test_static_takes_over_the_path_that_imitation_has_searched(env, tmp_path):
    agent = make_agent("imitation", env, epochs=1)
    agent.learn(1, configure(str(tmp_path), []), lambda rollout: None)
    agent.save_extra(tmp_path)
    static = make_agent("static", env, path=tmp_path)
    static.learn(1, configure(str(tmp_path), []), lambda rollout: None)
    np.testing.assert_array_equal(static.masks, agent.path)
    (tmp_path / MASKS).unlink()
    with pytest.raises(FileNotFoundError, match="static or imitation"):
        make_agent("static", env, path=tmp_path).learn(1, configure(str(tmp_path), []), lambda rollout: None)


def test_a_path_of_layers_is_learned_from_searched_here_or_by_static(env, custom, tmp_path):
    names = env.core.switch_names
    train(CUSTOM, "static", tmp_path / "tried", steps=1, **{**custom, "per": "layer"}, confidence=0.5)
    with pytest.raises(ValueError, match="no path from dense to all skipped"):  # all masks, for they are few
        make_agent("imitation", env, path=tmp_path / "tried").learn(1, configure(None, []), lambda rollout: None)
    agent = make_agent("imitation", env, epochs=1, per="layer")
    agent.learn(1, configure(None, []), lambda rollout: None)
    path = agent.path
    assert len(path) == len(names) // 2 + 1
    np.testing.assert_array_equal(path[:, :-1:2], path[:, 1:-1:2])
    seen = np.random.default_rng(0).normal(size=(200, *env.single_observation_space.shape))
    decided = np.concatenate([agent.policy().with_margin(margin).decide(seen) for margin in np.linspace(-8, 8, 33)])
    assert len(np.unique(decided, axis=0)) > 1
    np.testing.assert_array_equal(decided[:, :-1:2], decided[:, 1:-1:2])  # layers are skipped whole
    agent.save_extra(tmp_path)
    again = make_agent("imitation", env, epochs=1, path=tmp_path)
    again.learn(1, configure(None, []), lambda rollout: None)
    np.testing.assert_array_equal(again.path, path)


def test_where_nothing_is_foreseen_the_mean_risk_stays(env, tmp_path):
    agent = make_agent("imitation", env, epochs=3, learning_rate=100.0)  # every epoch is worse than none
    rows = np.arange(40) % len(env.core.split("train"))
    lost = np.repeat([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]], 10, axis=0).astype(np.float32)
    risk = agent._predict_risk(rows, lost, configure(str(tmp_path), []))
    torch.testing.assert_close(risk, torch.tensor([[0.25, -0.25]]).expand(40, 2), rtol=0, atol=2e-4)


def test_the_networks_of_the_risk_hold_different_rows_out(env, tmp_path, monkeypatch):
    agent, held_out = make_agent("imitation", env, epochs=1), []
    rows, outputs = np.arange(min(40, len(env.core.split("train")))), agent._outputs

    def seen(network, some):
        held_out.extend(some if len(some) == len(rows) // 10 else [])  # no minibatch is as small
        return outputs(network, some)

    monkeypatch.setattr(agent, "_outputs", seen)
    agent._predict_risk(rows, np.zeros((len(rows), 2), dtype=np.float32), configure(str(tmp_path), []))
    assert len(set(held_out)) == len(agent.risk_networks) * (len(rows) // 10)


def test_a_blind_imitation_finds_the_best_mask_of_the_path(env, tmp_path):
    agent, seen = make_agent("blind-imitation", env, epochs=200, learning_rate=0.01, weight_decay=0.0), []
    for network in agent.risk_networks:
        network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].any().item()))
    agent.learn(1, configure(str(tmp_path), []), lambda rollout: None)
    assert seen
    assert not any(seen)
    split = env.core.split("train")
    path, rows = agent.path, np.random.default_rng(0).permutation(len(split))[len(split) // 10 :]  # some are held out
    flops = np.array([split.costs.flops_ratio(rows, np.tile(mask, (len(rows), 1))).mean() for mask in path])
    decided = np.unique(agent.policy().decide(env.core.observe(split, rows)), axis=0)
    assert len(decided) == 1
    price = flops + 2.0 * path_losses(split, rows, path).mean(axis=0)
    assert price[(path == decided).all(axis=1)] <= price.min() + 0.1


@pytest.mark.parametrize("algo", ["imitation", "blind-imitation"])
def test_imitation_learns_what_is_to_come_at_each_stage(staged_keys, algo, tmp_path):
    """A loss costs little, so nearly all is skipped; another run takes its path over, in stages or at once."""
    settings = {**staged_keys, **OVER, "penalty": 1e-3}
    result = train(STAGED, algo, tmp_path / "run", steps=1, **settings)
    assert result["last_policy"]["flops_ratio"] < 0.2
    _, core, policy = load_run(tmp_path / "run")
    assert policy.stages == STAGES
    leaves(core, tmp_path / "run", result)
    path = np.array(json.loads((tmp_path / "run" / "masks.json").read_text()))
    for stages in (STAGES, ["first"]):
        other = gym.make_vec(STAGED, num_envs=2, **{**staged_keys, "stages": stages}).unwrapped
        agent, _ = learned(other, algo, 1, tmp_path / "log", path=tmp_path / "run", epochs=1)
        np.testing.assert_array_equal(agent.path, path)


@pytest.mark.parametrize("stages", [["first"], STAGES])
def test_the_last_batch_may_have_one_row(staged_keys, stages, tmp_path):
    env = gym.make_vec(STAGED, num_envs=2, **{**staged_keys, "stages": stages}).unwrapped
    rows = len(env.core.split("train"))
    batch_size = rows - max(1, rows // 10) - 1
    learned(env, "imitation", 1, tmp_path, epochs=1, batch_size=batch_size)


def test_it_learns_on_the_training_split_alone(custom):
    env = gym.make_vec(CUSTOM, num_envs=8, split="validation", **custom).unwrapped
    with pytest.raises(ValueError, match=r"learns on the rows of split=train, got an env with split=validation"):
        make_agent("imitation", env).learn(1, configure(None, []), lambda rollout: None)
