"""Searches and controls on a tiny backbone, where everything can be tried."""

from itertools import pairwise, product

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.baselines import early_exit
from sd_gym.agents.baselines.search import (
    all_masks,
    beam_search,
    exhaustive_search,
    greedy_path,
    learned_path,
    path_losses,
    path_steps,
    skip_units,
)
from sd_gym.agents.baselines.static import MASKS
from sd_gym.agents.experiment.run import train
from sd_gym.agents.learning.decisions import halves
from sd_gym.agents.runs.verdict import Verdict, verdict
from stable_baselines3.common.logger import configure

import sd_gym
from sd_gym.envs.actions import read_masks


@pytest.fixture
def settings(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone), "epsilon": 0.0}


@pytest.fixture
def env(settings):
    vector = gym.make_vec("SD/Classification-Custom-v0", num_envs=8, **settings).unwrapped
    vector.reset(seed=0)
    return vector


def everything(core, split):
    """Outcome of every decision on every instance: decisions [64, 7], quality and FLOPs ratio [64, n]."""
    decisions = np.array(list(product(*map(range, core.nvec))))
    rows = np.arange(len(split))
    outcomes = [core.score(split, rows, np.tile(decision, (len(rows), 1))) for decision in decisions]
    return decisions, np.stack([o.quality for o in outcomes]), np.stack([o.flops_ratio for o in outcomes])


def good_in(core, split):
    def good(rows, decisions):
        outcome = core.score(split, rows, decisions)
        return outcome.quality >= outcome.quality_ref

    return good


def nobody(scored):
    pass


def test_exhaustive_search_finds_the_cheapest_good_decision_of_each_instance(env):
    core, split = env.core, env.core.split("train")
    rows = np.arange(len(split))
    found = exhaustive_search(core, split, rows, good_in(core, split), nobody)
    _, quality, ratio = everything(core, split)
    cheapest = np.where(quality >= quality[0], ratio, np.inf).min(axis=0)
    np.testing.assert_allclose(split.costs.flops_ratio(rows, found), cheapest)


def test_a_wider_beam_is_never_worse_and_always_good(env):
    core, split = env.core, env.core.split("train")
    rows, good = np.arange(len(split)), good_in(env.core, env.core.split("train"))
    best = split.costs.flops_ratio(rows, exhaustive_search(core, split, rows, good, nobody))
    last = np.ones(len(rows))
    for width in (1, 4, 64):
        found = beam_search(core, split, rows, list(np.arange(core.n_switches)), good, nobody, width=width)
        assert good(rows, found).all()
        ratio = split.costs.flops_ratio(rows, found)
        assert ratio.mean() <= last.mean() + 1e-12
        last = ratio
    np.testing.assert_allclose(last, best)  # wide enough to hold all 64 decisions


def test_a_greedy_path_skips_one_component_more_at_a_time(env):
    core, split = env.core, env.core.split("train")
    path = greedy_path(core, split, np.arange(len(split)), nobody)
    assert not path[0].any()
    np.testing.assert_array_equal(path[-1][:-1], 1)
    assert len(path) == core.n_switches + 1
    assert all((after - before).sum() == 1 for before, after in pairwise(path))
    assert sorted(np.concatenate(path_steps(path))) == list(range(core.n_switches))


def test_a_greedy_path_of_layers_skips_all_sublayers_of_a_layer(env):
    core, split = env.core, env.core.split("train")
    path = greedy_path(core, split, np.arange(len(split)), nobody, per="layer")
    layers = {name.rpartition(".")[0] for name in core.switch_names}
    for raised in path_steps(path):
        (layer,) = {core.switch_names[component].rpartition(".")[0] for component in raised}
        layers.remove(layer)
        assert [core.switch_names[component] for component in raised] == [
            name for name in core.switch_names if name.startswith(f"{layer}.")
        ]
    assert not layers


class Known:
    """A split whose quality and FLOPs are known: three switches and two token levels, of these shares of the FLOPs."""

    nvec = np.array([2, 2, 2, 3])
    shares = np.array([0.2, 0.2, 0.3, 0.1])
    switch_names = ("encoder.0.attention", "encoder.1.attention", "encoder.1.feed_forward")

    def __init__(self):
        self.costs = self.scoring = self

    def quality_and_likelihood(self, rows, decisions):
        first, second, third, level = decisions.T
        lost = (third == 1) & ((first == 1) | (second == 1))  # the third alone will do, or the first two
        quality = 1.0 - (lost | (level == 2))
        return quality, quality

    def under_all(self, rows, masks):
        found = np.stack(
            [self.quality_and_likelihood(rows, np.tile(mask, (len(rows), 1)))[0] for mask in masks], axis=1
        )
        return found, found

    def flops_ratio(self, rows, decisions):
        return 1 - decisions @ self.shares


def test_a_learned_path_finds_the_mask_that_a_greedy_one_misses():
    known, rows, best, seen = Known(), np.arange(40), (1, 1, 0, 1), []
    assert best not in {tuple(mask) for mask in greedy_path(known, known, rows, nobody)}
    path = learned_path(known, known, rows, seen.append, 0)
    assert best in {tuple(mask) for mask in path}
    assert not path[0].any()
    np.testing.assert_array_equal(path[-1], [1, 1, 1, 2])
    assert all(np.diff(path, axis=0).sum(axis=1) == 1)
    assert seen == [40 * 4 * update for update in range(1, 51)]
    np.testing.assert_array_equal(learned_path(known, known, rows, nobody, 0), path)


def test_a_learned_path_of_layers_raises_a_layer_or_a_token_level():
    known, rows = Known(), np.arange(40)
    path = learned_path(known, known, rows, nobody, 0, per="layer")
    steps = [tuple(raised) for raised in path_steps(path)]
    assert sorted(steps) == [(0,), (1, 2), (3,), (3,)]
    assert steps[-1] != (0,)  # which loses nothing


def test_all_decisions_of_layers():
    units = skip_units(Known(), "layer")
    assert [unit.tolist() for unit in units] == [[0], [1, 2], [3]]
    found = np.stack(all_masks(Known.nvec, units))
    assert len(np.unique(found, axis=0)) == len(found) == 2 * 2 * 3
    assert not found[0].any()
    assert (found[:, 1] == found[:, 2]).all()


def test_what_instances_lose_along_a_path(env):
    core, split = env.core, env.core.split("train")
    rows, seen = np.array([5, 0, 9]), []
    path = greedy_path(core, split, rows, nobody)
    lost = path_losses(split, rows, path, seen.append)
    for mask, column in zip(path, lost.T, strict=True):
        outcome = core.score(split, rows, np.tile(mask, (3, 1)))
        np.testing.assert_array_equal(column, outcome.quality_ref - outcome.quality)
    assert seen == [3 * len(path)]


def test_the_static_agent_finds_the_best_of_all_masks(settings, tmp_path):
    settings["epsilon"] = 0.3  # which two instances without a loss show, if no certainty is asked for
    result = train("SD/Classification-Custom-v0", "static", tmp_path / "run", steps=1, settings=settings, strictness=0)
    assert result["decisions_used"] == 1
    core = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped.core
    split = core.split("validation")
    _, quality, ratio = everything(core, split)
    kept = [
        all(verdict(own[rows], quality[0, rows], 0.3, errors=0) == Verdict.KEPT for rows in halves(split))
        for own in quality
    ]
    best = ratio[kept].mean(axis=1).min()
    assert best < 1
    mask = np.array([[*result["skip_rate"].values(), 0]]).astype(int)
    assert split.costs.flops_ratio(np.arange(len(split)), np.tile(mask, (len(split), 1))).mean() == pytest.approx(best)


def test_the_static_agent_skips_whole_layers(settings, tmp_path):
    settings |= {"epsilon": 1.0, "per": "layer"}
    train("SD/Classification-Custom-v0", "static", tmp_path / "run", steps=1, settings=settings, strictness=0)
    masks = read_masks(tmp_path / "run" / MASKS, np.full(7, 2))
    assert len(masks) == 2**3  # all there are
    np.testing.assert_array_equal(masks[:, 0:6:2], masks[:, 1:6:2])


def test_a_table_of_some_masks_knows_no_layers(settings, tmp_path):
    sd_gym.tabulate("SD/Classification-Custom-v0", tmp_path / "table", decisions="random:8", **settings)
    env = gym.make_vec("SD/Table-v0", num_envs=1, table=str(tmp_path / "table")).unwrapped
    with pytest.raises(ValueError, match="per=layer"):
        make_agent("static", env, per="layer").learn(1, configure(str(tmp_path), []), nobody)


def test_no_policy_saves_more_than_the_oracle(settings, tmp_path):
    oracle = train("SD/Classification-Custom-v0", "oracle", tmp_path / "oracle", steps=1, settings=settings)
    static = train("SD/Classification-Custom-v0", "static", tmp_path / "static", steps=1, settings=settings)
    assert oracle["quality"] >= oracle["quality_ref"]
    assert oracle["flops_ratio"] <= static["flops_ratio"]
    assert not (tmp_path / "oracle" / "policy.json").exists()
    assert oracle["time"] == {}


def test_early_exit_leaves_at_the_first_sure_layer(env):
    agent = make_agent("early-exit", env)
    split = env.core.split("train")
    rows = np.arange(len(split))
    confidence = agent._confidence(split)
    assert confidence.shape == (len(split), 3)
    dense = split.passes.confidence(rows, np.zeros((len(split), len(env.core.nvec)), dtype=int))
    np.testing.assert_allclose(confidence[:, -1], dense)
    agent.threshold = float(np.median(confidence[:, 0]))
    decided = agent.decide_split(split)
    sure = confidence[:, 0] >= agent.threshold
    assert 0 < sure.sum() < len(split)
    np.testing.assert_array_equal(decided.decisions[sure], np.tile([0, 0, 1, 1, 1, 1, 0], (sure.sum(), 1)))
    assert not decided.decisions[~sure][:, :4].any()
    head = env.core.backbone.flops.costs(split.encoded.source_length)[0]
    assert (decided.flops[sure] == 0).all()
    assert (decided.flops[~sure] >= head[~sure]).all()


def test_early_exit_keeps_the_validation_quality(settings, tmp_path):
    result = train("SD/Classification-Custom-v0", "early-exit", tmp_path / "run", steps=1, settings=settings)
    assert result["flops_ratio_with_policy"] >= result["flops_ratio"]


def test_confidence_exits_at_the_stages_by_a_threshold_of_each(settings):
    env = gym.make_vec("SD/Classification-Custom-Staged-v0", num_envs=1, **settings).unwrapped
    agent, split = make_agent("confidence", env), env.core.split("train")
    confidence = agent._confidence(split)
    assert confidence.shape == (len(split), 2)  # before the middle layer, and at the end
    sure = confidence[:, 0] >= (threshold := float(np.median(confidence[:, 0])))
    agent.threshold = np.array([threshold, 1.01])
    decided = agent.decide_split(split)
    expected = np.where(sure[:, None], [0, 0, 1, 1, 1, 1, 0], 0)
    np.testing.assert_array_equal(decided.decisions, expected)
    np.testing.assert_array_equal(decided.flops, np.where(sure, 0, split.costs.head_flops(np.arange(len(split)))))
    once = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped
    with pytest.raises(ValueError, match="confidence looks at the stages"):
        make_agent("confidence", once)


def test_confidence_has_a_threshold_for_each_stage(settings, monkeypatch):
    """Planted: every other input is right and 60% sure from the first look on; the others are wrong until the end, 55%
    sure at the first look and 90% at the second. One threshold for both looks lets nobody leave.
    """
    keys = {**settings, "stages": ["encoder.1", "encoder.2"]}
    env = gym.make_vec("SD/Classification-Custom-Staged-v0", num_envs=1, **keys).unwrapped
    agent = make_agent("confidence", env)

    def score(core, split, rows, decisions):
        ran = 6 - decisions[:, :-1].sum(axis=1)
        return {
            "quality": 1.0 * ((rows % 2 == 0) | (ran == 6)),
            "quality_ref": np.ones(len(rows)),
            "flops_ratio": ran / 6,
        }

    sure = np.array([[0.6, 0.6, 0.6], [0.55, 0.9, 0.9]])
    monkeypatch.setattr(early_exit, "keeps_quality", lambda core, scored, strictness: scored["quality"].mean() >= 1)
    monkeypatch.setattr(early_exit, "score_decisions", score)
    monkeypatch.setattr(agent, "_confidence", lambda split: sure[np.arange(len(split)) % 2])
    early_exit.EarlyExit.learn(agent, 1, None, lambda rollout: None)
    assert agent.threshold > 0.9
    agent.learn(1, None, lambda rollout: None)
    assert agent._exits(sure).tolist() == [0, 2]


def test_a_cascade_runs_again_where_it_is_not_sure(settings, tmp_path):
    env = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped
    agent, split = make_agent("cascade", env), env.core.split("train")
    rows = np.arange(len(split))
    assert not agent.decide_split(split).decisions.any()  # before it has searched: dense, once
    assert not agent.decide_split(split).flops.any()
    agent.mask = np.array([0, 0, 1, 1, 1, 1, 0])
    masked = np.tile(agent.mask, (len(rows), 1))
    confidence = split.passes.confidence(rows, masked)
    agent.threshold = float(np.median(confidence))
    unsure = confidence < agent.threshold
    assert 0 < unsure.sum() < len(rows)
    decided = agent.decide_split(split)
    np.testing.assert_array_equal(decided.decisions, np.where(unsure[:, None], 0, masked))
    np.testing.assert_array_equal(decided.flops, np.where(unsure, split.costs.flops(rows, masked), 0))
    result = train("SD/Classification-Custom-v0", "cascade", tmp_path / "run", steps=1, settings=settings)
    assert result["flops_ratio_with_policy"] >= result["flops_ratio"]
    generator = gym.make_vec("SD/Classification-Mini-v0", num_envs=1, train_size=50).unwrapped
    with pytest.raises(ValueError, match="a cascade needs a backbone that classifies"):
        make_agent("cascade", generator)


def test_early_exit_needs_a_classifier():
    env = gym.make_vec("SD/Classification-Mini-v0", num_envs=1, train_size=50).unwrapped
    with pytest.raises(ValueError, match="needs an encoder that classifies"):
        make_agent("early-exit", env)
