"""Searches over decisions: good static masks, and the cheapest good decision of each instance."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from sd_gym.envs.actions import all_decisions
from sd_gym.envs.protocols import Core, Split

SCREENED = 200  # instances that every move of a greedy search is tried on
FINALISTS = 3  # moves of a round that are tried on all instances
SMALL_LOSS = 0.004  # smaller losses are noise: among such moves, the one that saves most is the best
LIKELIHOOD_WEIGHT = 0.2  # beside the quality: the likelihood tells apart what exact match does not
PRICES = (-1.5, 7.0)  # logarithms of the penalties that a path is learned for: 0.2 to 1,100 a lost instance
UPDATES = 10  # of the thresholds, for each candidate of the path
INSTANCES, TRIES = 256, 4  # of an update: drawn instances, at most; decisions for each
LEARNING_RATE = 0.1  # of the thresholds, falling to a tenth; they are logarithms
SOFTNESS = (1.5, 0.4)  # of the thresholds, from the first update to the last
EXHAUSTIVE = 500_000  # scores; up to so many, all decisions are tried on all instances
BATCH = 4096  # decisions scored in one call
ALONG = 1024  # instances that are run along a path in one call

Array = NDArray
Per = Literal["sublayer", "layer"]  # what a search decides on as one
OnRound = Callable[[int], None]  # called with the decisions scored so far
Good = Callable[[Array, Array], Array]  # takes rows [n] and decisions [n, components] to bool [n]


def units_of(core: Core, per: Per = "sublayer") -> list[Array]:
    """The components of a decision, in parts that are raised together: each alone, or those of a layer.

    Args:
        core: An env's core.
        per: Of what. The last component, of the tokens, is always alone.

    Returns:
        Numbers of components, int64, a part each. Those of a layer that have no choice are left out.

    Raises:
        ValueError: If layers are asked for, and decisions are numbers of masks.
    """
    alone = [np.array([component]) for component in range(len(core.nvec))]
    if per == "sublayer":
        return alone
    names = core.switch_names
    if not names:
        raise ValueError(f"per=layer: {core.config.id} is a table of some masks, which have numbers; leave it out")
    layers: dict[str, list[int]] = {}
    for component, name in enumerate(names):
        if core.nvec[component] > 1:
            layers.setdefault(name.rpartition(".")[0], []).append(component)
    return [*map(np.array, layers.values()), alone[-1]]


def all_of(nvec: Array, units: list[Array]) -> list[Array]:
    """All decisions ``[components]`` whose units each have one choice, the first of them dense."""
    choices = all_decisions(nvec[[unit[0] for unit in units]])
    found = np.zeros((len(choices), len(nvec)), dtype=np.int64)
    for column, unit in enumerate(units):
        found[:, unit] = choices[:, [column]]
    return list(found)


def greedy_path(core: Core, split: Split, rows: Array, on_round: OnRound, *, per: Per = "sublayer") -> list[Array]:
    """Greedy search of static masks: one more candidate is skipped each round, the one least missed for what it saves.

    All moves of a round are screened on a few instances, the best of them are tried on all.

    Args:
        core: The env's core.
        split: Where the instances are.
        rows: The instances to search on, ``[n]``.
        on_round: Called after each round.
        per: What a candidate is: a sublayer, or a whole layer.

    Returns:
        Decisions ``[components]`` from dense to nothing.
    """
    path, units = [np.zeros_like(core.nvec)], units_of(core, per)
    scored, known = 0, {}

    def key(decision: Array, on: Array) -> tuple[int, bytes]:
        return len(on), decision.tobytes()

    def look(decisions: list[Array], on: Array) -> None:
        """Score what is not known yet: a round starts where the one before has ended."""
        nonlocal scored
        new = [decision for decision in decisions if key(decision, on) not in known]
        if not new:
            return
        scored += len(on) * len(new)
        quality, likelihood = split.scoring.under_all(on, np.stack(new))
        values = (quality + LIKELIHOOD_WEIGHT * likelihood).mean(axis=0)
        for decision, value in zip(new, values, strict=True):
            flops = split.costs.flops_ratio(on, np.tile(decision, (len(on), 1))).mean()
            known[key(decision, on)] = float(value), float(flops)

    def best_first(candidates: list[Array], on: Array) -> list[Array]:
        look([path[-1], *candidates], on)
        start, start_flops = known[key(path[-1], on)]

        def price(decision: Array) -> float:
            value, flops = known[key(decision, on)]
            return (start - value + SMALL_LOSS) / (abs(flops - start_flops) + 1e-9)

        return sorted(candidates, key=price)

    while candidates := _moves(core.nvec, path[-1], units):
        finalists = best_first(candidates, rows[:SCREENED])[:FINALISTS]
        path.append(best_first(finalists, rows)[0] if len(rows) > SCREENED else finalists[0])
        on_round(scored)
    return path


def learned_path(
    core: Core, split: Split, rows: Array, on_round: OnRound, seed: int, *, per: Per = "sublayer"
) -> list[Array]:
    """Learn a path of static masks for all penalties at once, by REINFORCE with the mean of a few tries as baseline.

    Every candidate (a switch, all those of a layer, or a step of the token level) has a threshold: it is skipped where
    a lost instance costs less than that. Each drawn instance draws a penalty as well and tries some decisions around
    the thresholds; they are worth the FLOPs that they save less the penalty times the quality that they lose. Sorted by
    threshold, the candidates are a path. Unlike in a greedy search no choice is final: the thresholds begin alike and
    soft, so that a candidate is first tried beside many others, and harden.

    Args:
        core: The env's core.
        split: Where the instances are.
        rows: The instances to learn on, ``[n]``.
        on_round: Called after each update.
        seed: Of all that is drawn.
        per: What a candidate is: a sublayer, or a whole layer.

    Returns:
        Decisions ``[components]`` from dense to nothing, each raising one candidate by one.
    """
    candidates = [unit for unit in units_of(core, per) for _ in range(core.nvec[unit[0]] - 1)]
    belongs = np.stack([np.isin(np.arange(len(core.nvec)), unit) for unit in candidates]).astype(np.int64)
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    threshold = torch.full((len(candidates),), float(np.mean(PRICES)), requires_grad=True)
    updates, instances = UPDATES * len(candidates), min(INSTANCES, len(rows))
    optimizer = torch.optim.Adam([threshold], lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, updates)
    for update in range(1, updates + 1):
        drawn, price = random.choice(rows, instances), random.uniform(*PRICES, instances)
        drawn, price = np.repeat(drawn, TRIES), np.repeat(price, TRIES)
        softness = SOFTNESS[0] * (SOFTNESS[1] / SOFTNESS[0]) ** (update / updates)
        logits = (threshold - torch.from_numpy(price)[:, None]) / softness
        skipped = torch.bernoulli(logits.detach().sigmoid(), generator=generator)
        decisions = skipped.numpy().astype(np.int64) @ belongs
        quality, likelihood = split.scoring.quality_and_likelihood(drawn, decisions)
        penalty = np.exp(price)
        value = penalty * (quality + LIKELIHOOD_WEIGHT * likelihood) - split.costs.flops_ratio(drawn, decisions)
        # At a high penalty the same loss weighs more; without a scale, it would be all that the thresholds learn from.
        value = (value / penalty**0.75).reshape(instances, TRIES)
        advantage = torch.from_numpy(value - value.mean(axis=1, keepdims=True)).reshape(-1, 1)
        optimizer.zero_grad()
        (F.binary_cross_entropy_with_logits(logits, skipped.double(), reduction="none") * advantage).mean().backward()
        optimizer.step()
        schedule.step()
        on_round(update * len(drawn))
    path = [np.zeros_like(core.nvec)]
    for candidate in torch.argsort(threshold.detach(), descending=True, stable=True).tolist():
        path.append(path[-1] + belongs[candidate])
    return path


def _moves(nvec: Array, decision: Array, units: list[Array]) -> list[Array]:
    """The decisions that skip a step more than ``decision`` in one unit."""
    found = []
    for unit in units:
        moved = decision.copy()
        moved[unit] += 1
        if (moved < nvec).all():
            found.append(moved)
    return found


def order_of(path: list[Array]) -> list[Array]:
    """The components that each step of a path raises, int64."""
    return [np.flatnonzero(after != before) for before, after in pairwise(path)]


def losses_along(split: Split, rows: Array, path: list[Array], on_round: OnRound) -> Array:
    """Quality that instances lose under each mask of a path.

    Args:
        split: Where the instances are.
        rows: The instances, ``[n]``.
        path: Decisions ``[components]``, the first of them dense.
        on_round: Called now and then.

    Returns:
        float64 ``[n, masks]``.
    """
    masks, quality = np.stack(path), []
    for start in range(0, len(rows), ALONG):
        quality.append(split.scoring.under_all(rows[start : start + ALONG], masks)[0])
        on_round((start + len(quality[-1])) * len(masks))
    found = np.concatenate(quality)
    return found[:, :1] - found


def search_each(
    core: Core, split: Split, rows: Array, order: list[Array], good: Good, on_round: OnRound, *, width: int = 1
) -> Array:
    """A cheap good decision for each instance, by beam search: one candidate after another is skipped where it may be.

    All instances try the same candidate at the same time, so that similar instances get similar decisions, which a
    policy can learn.

    Args:
        core: The env's core.
        split: Where the instances are.
        rows: The instances, ``[n]``.
        order: Components, in the order in which they are tried (``order_of``).
        good: Whether decisions are good enough.
        on_round: Called after each component.
        width: Decisions kept for each instance.

    Returns:
        int64 ``[n, components]``: of the kept decisions, the one with the fewest FLOPs; dense where none is good.
    """
    n, components = len(rows), len(core.nvec)
    beam = np.zeros((n, 1, components), dtype=np.int64)
    scored = 0
    for raises in order:
        raised = beam.copy()
        raised[:, :, raises] += 1
        both = np.concatenate([beam, raised], axis=1)
        flat, of_row = raised.reshape(-1, components), np.repeat(rows, raised.shape[1])
        parts = [slice(start, start + BATCH) for start in range(0, len(flat), BATCH)]
        alive = np.concatenate([good(of_row[part], flat[part]) for part in parts]).reshape(n, -1)
        flops = split.costs.flops_ratio(np.repeat(rows, both.shape[1]), both.reshape(-1, components)).reshape(n, -1)
        flops[:, beam.shape[1] :][~alive] = np.inf
        kept = np.argsort(flops, axis=1, kind="stable")[:, :width]
        # Where fewer are good than are kept, the best one stands in for the others.
        kept = np.where(np.isfinite(np.take_along_axis(flops, kept, axis=1)), kept, kept[:, :1])
        beam = np.take_along_axis(both, kept[:, :, None], axis=1)
        scored += len(flat)
        on_round(scored)
    return beam[:, 0]


def can_try_all(nvec: Array, instances: int) -> bool:
    """Whether all decisions can be tried on so many instances (12 switches and 122 of them, say)."""
    return int(np.prod(nvec)) * instances <= EXHAUSTIVE


def exhaustive_each(core: Core, split: Split, rows: Array, good: Good, on_round: OnRound) -> Array:
    """The cheapest good decision of each instance, of all there are; int64 ``[n, components]``, dense if none is."""
    best = np.zeros((len(rows), len(core.nvec)), dtype=np.int64)
    lowest = np.ones(len(rows))
    for number, choice in enumerate(product(*map(range, core.nvec)), start=1):
        decisions = np.tile(np.array(choice), (len(rows), 1))
        flops = split.costs.flops_ratio(rows, decisions)
        better = good(rows, decisions) & (flops < lowest)
        best[better], lowest[better] = decisions[better], flops[better]
        on_round(number * len(rows))
    return best
