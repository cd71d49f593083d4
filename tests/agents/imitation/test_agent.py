"""Imitation: exchange rates of FLOPs and risk along a path of masks, and a policy that learns them."""

from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_gym.agents import make_agent
from sd_gym.agents.baselines.search import path_losses
from sd_gym.agents.baselines.static import MASKS
from sd_gym.agents.experiment.run import train
from sd_gym.agents.imitation.agent import SEARCHED, read_search
from sd_gym.agents.imitation.path_logits import component_logits, step_logits
from stable_baselines3.common.logger import configure

from sd_gym.policy import DecisionPolicy

CUSTOM = "SD/Classification-Custom-v0"


@st.composite
def paths(draw):
    """What each of a few instances risks under the masks of a path, and what the masks cost."""
    masks = draw(st.integers(2, 8))
    saved = draw(st.lists(st.integers(1, 20), min_size=masks - 1, max_size=masks - 1))
    values = st.lists(st.integers(-50, 100), min_size=masks - 1, max_size=masks - 1)
    risk = draw(st.lists(values, min_size=1, max_size=4))
    flops = 1 - np.cumsum([0, *saved]) / (1 + sum(saved))
    return np.column_stack([np.zeros(len(risk)), np.array(risk) / 100]), flops


@given(paths(), st.floats(0.05, 200.0))
@settings(deadline=None)
def test_a_bound_on_the_logits_ends_the_path_at_the_best_mask(path, multiplier):
    risk, flops = path
    logits = step_logits(torch.from_numpy(risk).float(), torch.from_numpy(flops)).numpy()
    assert (np.diff(logits, axis=1) <= 1e-6).all()
    taken = (logits > np.log(multiplier)).sum(axis=1)
    price = flops + multiplier * risk
    np.testing.assert_allclose(price[np.arange(len(risk)), taken], price.min(axis=1), rtol=1e-4, atol=1e-4)


def test_steps_that_only_pay_together_have_one_rate():
    risk = torch.tensor([[0.0, 0.10, 0.02, 0.52]])  # the second mask alone is worse than the third, which is cheaper
    rates = step_logits(risk, torch.tensor([1.0, 0.9, 0.8, 0.3])).exp()
    torch.testing.assert_close(rates, torch.tensor([[10.0, 10.0, 1.0]]))


def test_many_instances_have_the_rates_of_each_alone(monkeypatch):
    risk, flops = torch.rand(7, 5).cumsum(dim=1), torch.linspace(1, 0, 5)
    monkeypatch.setattr("sd_gym.agents.imitation.path_logits.PART", 3)
    alone = torch.cat([step_logits(row[None], flops) for row in risk])
    torch.testing.assert_close(step_logits(risk, flops), alone, rtol=0, atol=0)


@pytest.mark.parametrize("taken", range(5))
def test_a_policy_takes_the_steps_with_positive_logits(taken):
    nvec = np.array([2, 2, 3])
    path = np.array([[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 2]])
    steps = torch.linspace(1, -1, 4) + 0.01 + (taken - 2) * 2 / 3
    assert (steps > 0).sum() == taken
    logits = component_logits(steps[None], path, nvec)
    policy = DecisionPolicy(1, nvec.tolist(), ["a", "b"])
    np.testing.assert_array_equal(policy.choose(logits)[0], path[taken])


def test_a_step_of_several_components_raises_all_of_them():
    nvec, path = np.array([2, 2, 2, 2]), np.array([[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    logits = component_logits(torch.tensor([[2.0, -1.0, -3.0]]), path, nvec)
    assert logits.tolist() == [[0, -1, 0, 2, 0, 2, 0, -3]]


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
    rows, path, lost = agent.searched
    assert sorted(rows) == list(range(len(split)))
    np.testing.assert_array_equal(lost, path_losses(split, rows, list(path), lambda scored: None))
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
    np.testing.assert_array_equal(static.masks, agent.searched.path)
    (tmp_path / MASKS).unlink()
    with pytest.raises(FileNotFoundError, match="static or imitation"):
        make_agent("static", env, path=tmp_path).learn(1, configure(str(tmp_path), []), lambda rollout: None)


def test_a_path_of_layers_is_learned_from_searched_here_or_by_static(env, custom, tmp_path):
    names = env.core.switch_names
    train(CUSTOM, "static", tmp_path / "tried", steps=1, settings={**custom, "per": "layer"}, strictness=0)
    with pytest.raises(ValueError, match="no path from dense to nothing"):  # all masks, for they are few
        make_agent("imitation", env, path=tmp_path / "tried").learn(1, configure(None, []), lambda rollout: None)
    agent = make_agent("imitation", env, epochs=1, per="layer")
    agent.learn(1, configure(None, []), lambda rollout: None)
    path = agent.searched.path
    assert len(path) == len(names) // 2 + 1
    np.testing.assert_array_equal(path[:, :-1:2], path[:, 1:-1:2])
    seen = np.random.default_rng(0).normal(size=(200, *env.single_observation_space.shape))
    decided = np.concatenate([agent.policy().with_margin(margin).decide(seen) for margin in np.linspace(-8, 8, 33)])
    assert len(np.unique(decided, axis=0)) > 1
    np.testing.assert_array_equal(decided[:, :-1:2], decided[:, 1:-1:2])  # layers are skipped whole
    agent.save_extra(tmp_path)
    (tmp_path / SEARCHED).unlink()
    again = make_agent("imitation", env, epochs=1, path=tmp_path)
    again.learn(1, configure(None, []), lambda rollout: None)
    np.testing.assert_array_equal(again.searched.path, path)
    np.testing.assert_array_equal(again.searched.lost, agent.searched.lost)


def test_where_nothing_is_foreseen_the_mean_risk_stays(env, tmp_path):
    agent = make_agent("imitation", env, epochs=3, learning_rate=100.0)  # every epoch is worse than none
    rows = np.arange(40) % len(env.core.split("train"))
    lost = np.repeat([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]], 10, axis=0).astype(np.float32)
    risk = agent._foresee(rows, lost, configure(str(tmp_path), []))
    torch.testing.assert_close(risk, torch.tensor([[0.25, -0.25]]).expand(40, 2), rtol=0, atol=2e-4)


def test_a_blind_imitation_finds_the_best_mask_of_the_path(env, tmp_path):
    agent, seen = make_agent("blind-imitation", env, epochs=200, learning_rate=0.01, weight_decay=0.0), []
    agent.foresight[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].any().item()))
    agent.learn(1, configure(str(tmp_path), []), lambda rollout: None)
    assert seen
    assert not any(seen)
    split = env.core.split("train")
    rows, path, lost = agent.searched
    learned = rows[len(rows) // 10 :], lost[len(rows) // 10 :]  # the first tenth is held out
    flops = np.array([split.costs.flops_ratio(rows, np.tile(mask, (len(rows), 1))).mean() for mask in path])
    decided = np.unique(agent.policy().decide(env.core.observe(split, rows)), axis=0)
    assert len(decided) == 1
    price = flops + 2.0 * learned[1].mean(axis=0)
    assert price[(path == decided).all(axis=1)] <= price.min() + 0.1


def test_a_search_can_be_taken_over(custom, tmp_path):
    runs = {}
    for name, path in (("first", None), ("again", tmp_path / "first")):
        train(CUSTOM, "imitation", tmp_path / name, steps=1, settings={**custom, "path": path})
        runs[name] = [(tmp_path / name / file).read_bytes() for file in ("policy.safetensors", SEARCHED)]
    assert runs["first"] == runs["again"]
    with pytest.raises(ValueError, match="7 components and rows up to 31; expected 7 components, and rows of a train"):
        read_search(tmp_path / "first", 30, np.full(7, 2))
    with pytest.raises(ValueError, match="expected 6 components"):
        read_search(tmp_path / "first", 32, np.full(6, 2))
