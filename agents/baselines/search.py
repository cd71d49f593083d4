"""Searches over decisions: good static masks, and the cheapest good decision of each instance."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray as Array
from torch.nn import functional as F

from sd_gym.envs.actions import all_decisions, number_of_decisions
from sd_gym.envs.protocols import Core, Split, mean_flops

SCREENED = 200  # instances for a first score of every move of a greedy search
FINALISTS = 3  # moves per round that are scored on all instances
SMALL_LOSS = 0.004  # smaller losses are noise: among such moves, the one that saves most is the best
LIKELIHOOD_WEIGHT = 0.2  # the likelihood distinguishes decisions with equal exact matches
PRICES = (-1.5, 7.0)  # logarithms of the penalties of a learned path: 0.2 to 1,100 per lost instance
UPDATES = 10  # updates of the thresholds, per candidate of the path
INSTANCES, TRIES = 256, 4  # per update: instances drawn, at most; decisions for each
LEARNING_RATE = 0.1  # for the thresholds, which are logarithms; it falls to a tenth
SOFTNESS = (1.5, 0.4)  # softness of the thresholds, at the first and the last update
EXHAUSTIVE = 500_000  # scores up to which all decisions are tried on all instances
BATCH = 4096  # decisions scored in one call
PATH_BATCH = 1024  # instances per call, under all masks of a path
CODEBOOK_SIZE = 16

Per = Literal["sublayer", "layer"]  # what a step of a search skips
OnRound = Callable[[int], None]  # called with the decisions scored so far
IsGood = Callable[[Array, Array], Array]  # from rows [n] and decisions [n, components] to bool [n]


def skip_units(core: Core, per: Per = "sublayer") -> list[Array]:
    """Groups of a decision's components that are raised together, int64: each alone, or those of a layer.

    The token level is a group of its own, the last one. Components of layers without a choice are left out. Raises
    ``ValueError`` for layers if decisions are indices of masks.
    """
    alone = [np.array([component]) for component in range(core.n_skips)]
    if per == "sublayer":
        return alone
    names = core.switch_names
    if not names:
        raise ValueError(f"per=layer: {core.config.id} is a table of some masks, chosen by index; leave it out")
    layers: dict[str, list[int]] = {}
    for component, name in enumerate(names):
        if core.nvec[component] > 1:
            layers.setdefault(name.rpartition(".")[0], []).append(component)
    return [*map(np.array, layers.values()), alone[-1]]


def all_masks(nvec: Array, units: list[Array]) -> Array:
    """All decisions with one choice per unit, int64 ``[masks, components]``, the dense one first."""
    choices = all_decisions(nvec[[unit[0] for unit in units]])
    masks = np.zeros((len(choices), len(nvec)), dtype=np.int64)
    for column, unit in enumerate(units):
        masks[:, unit] = choices[:, [column]]
    return masks


def greedy_path(
    core: Core, split: Split, rows: Array, on_round: OnRound = lambda scored: None, *, per: Per = "sublayer"
) -> Array:
    """Greedy search of static masks: each round skips the candidate that loses least per saved FLOPs.

    All moves of a round are scored on a few of ``rows [n]``, the best of them on all; then ``on_round`` is called.
    Returns decisions from dense to all skipped, int64 ``[masks, components]``.
    """
    path, units = [np.zeros_like(core.nvec)], skip_units(core, per)
    scored, known = 0, {}

    def key(decision: Array, on: Array) -> tuple[int, bytes]:
        return len(on), decision.tobytes()

    def best_first(candidates: list[Array], on: Array) -> list[Array]:
        nonlocal scored
        new = [decision for decision in [path[-1], *candidates] if key(decision, on) not in known]
        if new:
            scored += len(on) * len(new)
            quality, likelihood = split.scoring.under_all(on, np.stack(new))
            values = (quality + LIKELIHOOD_WEIGHT * likelihood).mean(axis=0)
            for decision, value, flops in zip(new, values, mean_flops(split, on, new), strict=True):
                known[key(decision, on)] = float(value), float(flops)
        start, start_flops = known[key(path[-1], on)]

        def price(decision: Array) -> tuple[float, float]:
            value, flops = known[key(decision, on)]
            lost, saved = max(start - value + SMALL_LOSS, 0.0), max(start_flops - flops, 0.0)
            return lost / (saved + 1e-9), flops  # of moves that cost nothing, the one that saves most

        return sorted(candidates, key=price)

    belongs = np.stack([np.isin(np.arange(len(core.nvec)), unit) for unit in units])
    while candidates := [moved for moved in path[-1] + belongs if (moved < core.nvec).all()]:
        finalists = best_first(candidates, rows[:SCREENED])[:FINALISTS]
        path.append(best_first(finalists, rows)[0] if len(rows) > SCREENED else finalists[0])
        on_round(scored)
    return np.stack(path)


def learned_path(
    core: Core, split: Split, rows: Array, on_round: OnRound, seed: int, *, per: Per = "sublayer"
) -> Array:
    """Learn a path of static masks for all penalties at once, by REINFORCE with the mean of a few tries as baseline.

    Every candidate (a switch, all those of a layer, or a step of the token level) has a threshold: it is skipped if the
    penalty of a lost instance is lower. Each drawn instance draws a penalty and tries some decisions around the
    thresholds. Their value is the saved FLOPs less the penalty times the lost quality. Sorted by threshold, the
    candidates are a path. Unlike in a greedy search no choice is final: the thresholds are equal and soft at first, and
    harden.

    Arguments and result as in ``greedy_path``; each decision raises one candidate by one.
    """
    candidates = [unit for unit in skip_units(core, per) for _ in range(core.nvec[unit[0]] - 1)]
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
        # Without this scale the highest penalties would dominate the gradient.
        value = (value / penalty**0.75).reshape(instances, TRIES)
        advantage = torch.from_numpy(value - value.mean(axis=1, keepdims=True)).reshape(-1, 1)
        optimizer.zero_grad()
        (F.binary_cross_entropy_with_logits(logits, skipped.double(), reduction="none") * advantage).mean().backward()
        optimizer.step()
        schedule.step()
        on_round(update * len(drawn))
    order = torch.argsort(threshold.detach(), descending=True, stable=True).numpy()
    return np.cumsum(np.concatenate([np.zeros_like(core.nvec)[None], belongs[order]]), axis=0)


def path_steps(path: Array) -> list[Array]:
    """The components that each step of a path ``[masks, components]`` changes, int64."""
    return [np.flatnonzero(step) for step in np.diff(path, axis=0)]


def path_losses(split: Split, rows: Array, path: Array, on_round: OnRound = lambda scored: None) -> Array:
    """Quality that ``rows [n]`` lose under each mask of a path, the first one dense; float64 ``[n, masks]``."""
    quality = []
    for start in range(0, len(rows), PATH_BATCH):
        quality.append(split.scoring.under_all(rows[start : start + PATH_BATCH], path)[0])
        on_round((start + len(quality[-1])) * len(path))
    qualities = np.concatenate(quality)
    return qualities[:, :1] - qualities


def beam_search(core: Core, split: Split, rows: Array, order: list[Array], good: IsGood, *, width: int) -> Array:
    """A cheap good decision for each of ``rows [n]``, by beam search: one candidate after another is skipped.

    ``order`` has the components of each candidate. Each instance keeps ``width`` decisions; the one with the fewest
    FLOPs is returned, int64 ``[n, components]``; dense if no other one is good.
    """
    n, components = len(rows), len(core.nvec)
    beam = np.zeros((n, 1, components), dtype=np.int64)
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
        # If fewer are good, copies of the best one fill the beam.
        kept = np.where(np.isfinite(np.take_along_axis(flops, kept, axis=1)), kept, kept[:, :1])
        beam = np.take_along_axis(both, kept[:, :, None], axis=1)
    return beam[:, 0]


def can_try_all(nvec: Array, instances: int) -> bool:
    """Whether trying all decisions on ``instances`` is affordable, such as 12 switches on 122 instances."""
    return number_of_decisions(nvec) * instances <= EXHAUSTIVE


def exhaustive_search(core: Core, split: Split, rows: Array, good: IsGood) -> Array:
    """The cheapest good decision of ``rows [n]``, int64 ``[n, components]``; dense if no other one is good."""
    best = np.zeros((len(rows), len(core.nvec)), dtype=np.int64)
    lowest = np.ones(len(rows))
    for choice in all_decisions(core.nvec):
        decisions = np.tile(choice, (len(rows), 1))
        flops = split.costs.flops_ratio(rows, decisions)
        better = good(rows, decisions) & (flops < lowest)
        best[better], lowest[better] = decisions[better], flops[better]
    return best


def nested_codebook(masks: Array, quality: Array, flops: Array, size: int = CODEBOOK_SIZE) -> list[int]:
    """The best chain of masks, each skipping everything that the previous one skips, and more.

    Suppose each input gets the last mask of the chain that keeps its quality. Then a step to the next mask saves the
    difference of their FLOPs on a share of the inputs: the mean quality of the next mask. Dynamic programming finds the
    chain with the highest sum of these products.

    Args:
        masks: ``[masks, components]``, with the dense one.
        quality: Mean quality of each, ``[masks]``.
        flops: FLOPs ratio of each, ``[masks]``.
        size: Masks of the chain, at most.

    Returns:
        Indices of ``masks``, the dense one first.
    """
    nested = np.ones((len(masks), len(masks)), dtype=bool)  # whether the second mask skips all that the first skips
    for component in masks.T:
        nested &= component[:, None] <= component[None, :]
    saved = flops[:, None] - flops[None, :]
    gain = np.where(nested & (saved > 0), saved * quality, -np.inf)
    values = [np.where(masks.any(axis=1), -np.inf, 0.0)]  # by length, of the best chain that ends at each mask
    previous = []
    for _ in range(size - 1):
        longer = values[-1][:, None] + gain
        previous.append(longer.argmax(axis=0))
        values.append(longer.max(axis=0))
    length, last = np.unravel_index(int(np.argmax(values)), (size, len(masks)))
    chain = [int(last)]
    for step in reversed(previous[:length]):
        chain.append(int(step[chain[-1]]))
    return chain[::-1]
