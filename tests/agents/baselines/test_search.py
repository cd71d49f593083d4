"""Searches on a tiny backbone, where everything can be tried."""

from itertools import pairwise

import numpy as np
from sd_gym.agents.baselines.search import (
    all_masks,
    beam_search,
    can_try_all,
    exhaustive_search,
    greedy_path,
    learned_path,
    path_losses,
    path_steps,
    skip_units,
)

from tests.agents.baselines.conftest import everything, good_in, nobody


def test_exhaustive_search_finds_the_cheapest_good_decision_of_each_instance(env):
    core, split = env.core, env.core.split("train")
    rows = np.arange(len(split))
    found = exhaustive_search(core, split, rows, good_in(core, split))
    _, quality, ratio = everything(core, split)
    cheapest = np.where(quality >= quality[0], ratio, np.inf).min(axis=0)
    np.testing.assert_allclose(split.costs.flops_ratio(rows, found), cheapest)


def test_a_wider_beam_is_never_worse_and_always_good(env):
    core, split = env.core, env.core.split("train")
    rows, good = np.arange(len(split)), good_in(env.core, env.core.split("train"))
    best = split.costs.flops_ratio(rows, exhaustive_search(core, split, rows, good))
    last = np.ones(len(rows))
    for width in (1, 4, 64):
        found = beam_search(core, split, rows, list(np.arange(core.n_switches)), good, width=width)
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
    n_skips = len(nvec)
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


def test_of_moves_that_gain_quality_the_one_that_saves_most_is_first():
    class Gains(Known):
        shares = np.array([0.01, 0.3, 0.2, 0.1])

        def quality_and_likelihood(self, rows, decisions):
            quality = 0.5 + decisions @ np.array([0.006, 0.02, -0.05, -0.05])
            return quality, quality

    path = greedy_path(Gains(), Gains(), np.arange(40), nobody)
    assert path[1].tolist() == [0, 1, 0, 0]
    assert path[2].tolist() == [1, 1, 0, 0]


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


def test_of_many_switches_not_all_decisions_are_tried():
    """Their number does not fit into 64 bits."""
    assert can_try_all(np.full(12, 2), 122)
    assert not any(can_try_all(np.full(switches, 2), 2000) for switches in (62, 63, 64, 66, 128))
