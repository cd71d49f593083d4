"""Imitation at several stages: from the last look back to the first, each stage learns what is to come of its choices.

The masks of a path, cut at the stages, leave each stage a few ways to go on, each skipping one candidate more. What
comes of the last stage's ways is scored, and a network learns the risk of each from what the stage shows. Of an earlier
stage's ways a network learns what is to come: the FLOPs and the loss that the stages behind it, which will have looked
again, end with, at each of a row of prices of a lost instance (backward induction; Bellman 1957). So a stage runs what
the next one needs to see, where that pays later, and skips at once where it is sure. Each step of a stage has the price
up to which it pays: its logit. A margin on the logits of all stages is another price.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.imitation.rates import step_logits
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.envs.protocols import Core
from sd_gym.execution.passes import PASS_TOKENS
from sd_gym.policy import HIDDEN
from sd_gym.policy.observations import to_tensors
from sd_gym.switch import PassState

AT_ONCE = 256  # instances whose tokens are embedded at once
LOG_PRICES = torch.linspace(-3, 6, 13)  # of a lost instance over the env's own, what earlier stages foresee


class Stretch(NamedTuple):
    """What a stage can choose.

    Attributes:
        components: Of a decision, those that are its own, int64.
        ways: Decisions, zeros but for these components, each skipping one candidate more: from all that runs on, int64
            ``[ways, components of a decision]``.
    """

    components: NDArray
    ways: NDArray


class Looks(NamedTuple):
    """What instances have shown at a stage, each in as many looks.

    Attributes:
        shown: All but tokens, float32 ``[n, looks, features]``.
        rows: Of the instances, int64 ``[n]``.
        tokens: From rows ``[n]`` to their tokens, which are embedded anew each time: keeping them all is not cheap.
            ``None``: none are seen.
    """

    shown: Tensor
    rows: NDArray
    tokens: Callable[[NDArray], dict[str, Tensor]] | None

    def of(self, chosen: Tensor | slice) -> Tensor | dict[str, Tensor]:
        """Observations of some instances, their looks one after the other; all of one are of the same tokens."""
        shown = self.shown[chosen]
        if self.tokens is None:
            return shown.flatten(0, 1)
        return {"stage": shown.flatten(0, 1), **self.tokens(self.rows[chosen])}

    @torch.no_grad()
    def through(self, network: nn.Module) -> Tensor:
        """What a network makes of all of them, ``[n * looks, outputs]``."""
        size = len(self.shown) if self.tokens is None else AT_ONCE
        return torch.cat([network(self.of(part)) for part in torch.arange(len(self.shown)).split(size)])


class Taught(NamedTuple):
    """What the policy shall say at a stage.

    Attributes:
        looks: What was seen there.
        steps: Logits of its steps, float32 ``[n, looks, ways - 1]``.
    """

    looks: Looks
    steps: Tensor


def stretches(core: Core, path: NDArray) -> list[Stretch]:
    """What of a path of masks, ``[masks, components]``, each stage of a core decides."""
    found = []
    for components in core.steps.components:
        ways = np.zeros_like(path)
        ways[:, components] = path[:, components]
        changes = np.append(True, (ways[1:] != ways[:-1]).any(axis=1))
        found.append(Stretch(components, ways[changes]))
    return found


def prefixes(drawn: NDArray, before: Sequence[Stretch]) -> NDArray:
    """Under what a stage is looked at: nothing skipped, and what masks that were drawn say of the stages before it.

    Args:
        drawn: A mask for each instance, ``[n, components]``.
        before: Of the stages before it.

    Returns:
        int64 ``[n, looks, components]``: two looks, or of the first stage one.
    """
    said = np.zeros_like(drawn)
    for stretch in before:
        said[:, stretch.components] = drawn[:, stretch.components]
    return np.stack([np.zeros_like(drawn), said], axis=1) if before else said[:, None]


def batches(length: NDArray, size: int) -> Iterator[NDArray]:
    """Positions of rows with these lengths ``[n]``, in parts of about the same length and so many rows."""
    order = np.argsort(length, kind="stable")
    return iter(np.split(order, range(size, len(order), size)))


def best(prospects: Tensor, prices: Tensor) -> Tensor:
    """What comes of the best way at each price.

    Args:
        prospects: FLOPs ratio, quality lost and quality gained of each way, ``[n, ways, prices, 3]``.
        prices: ``[prices]``.

    Returns:
        ``[n, prices, 3]``.
    """
    chosen = costs(prospects, prices).argmin(dim=1)
    return prospects.gather(1, chosen[:, None, :, None].expand(-1, 1, -1, 3))[:, 0]


def costs(prospects: Tensor, prices: Tensor) -> Tensor:
    """FLOPs ratio plus the price of the quality that is lost, ``[n, ways, prices]``; arguments as of ``best``."""
    flops, losing, gaining = prospects.unbind(dim=-1)
    return flops + prices * (losing - gaining)


def price_logits(cost: Tensor, log_prices: Tensor) -> Tensor:
    """Logarithm of the price up to which each step of a stage pays: to go any way behind it, not any before it.

    Args:
        cost: Of each way at each price, ``[n, ways, prices]``.
        log_prices: Logarithms of the prices, evenly spaced, rising, ``[prices]``.

    Returns:
        float32 ``[n, ways - 1]``, not rising along the ways; half a space beyond the prices where it always pays, or
        never.
    """
    before = cost.cummin(dim=1).values[:, :-1]
    behind = cost.flip(1).cummin(dim=1).values.flip(1)[:, 1:]
    gain = (before - behind) / (log_prices / 2).exp()
    pays = (gain > 0).long().cumprod(dim=2).sum(dim=2)  # prices, from the lowest on
    last, next_one = ((pays + shift).clamp(0, len(log_prices) - 1)[..., None] for shift in (-1, 0))
    last, next_one = gain.gather(2, last)[..., 0], gain.gather(2, next_one)[..., 0]
    inside = (pays > 0) & (pays < len(log_prices))
    share = torch.where(inside, last / (last - next_one).clamp(min=1e-12), 0.5)  # of the space behind the last one
    return log_prices[0] + (log_prices[1] - log_prices[0]) * (pays - 1 + share)


class Induction:
    """Learns what is to come, stage by stage, from the last one back.

    Args:
        core: The env's core.
        rows: Of the training split, int64 ``[n]``.
        path: Masks from dense to nothing, int64 ``[masks, components]``.
        bodies: For each stage, a module from observations to ``HIDDEN`` features.
        fit: Minimises a loss of some instances: takes a module, the loss and a tag.
        sees: What of observations is seen: all, or nothing but the stage.
        tokens: Whether tokens are among them.
        on_scored: Called with the decisions scored so far.
        seed: Of the masks that are drawn to look under.
    """

    def __init__(
        self,
        core: Core,
        rows: NDArray,
        path: NDArray,
        bodies: Sequence[nn.Module],
        fit: Callable[[nn.Module, Callable[[Tensor | slice], Tensor], str], None],
        sees: Callable[[Tensor | dict[str, Tensor]], Tensor | dict[str, Tensor]],
        tokens: bool,
        on_scored: Callable[[int], None],
        seed: int,
    ) -> None:
        self.core, self.split, self.rows, self.bodies = core, core.split("train"), rows, bodies
        self.stretches = stretches(core, path)
        self._drawn = path[np.random.default_rng(seed).integers(len(path), size=len(rows))]
        self._fit, self._sees, self._on_scored, self._scored = fit, sees, on_scored, 0
        self._tokens = tokens
        self._log_multiplier = math.log(core.config.reward.penalty / core.config.reward.cost_scale)
        self.log_prices = LOG_PRICES + self._log_multiplier
        self._networks: dict[int, nn.Module] = {}  # of each stage, what is to come of its ways

    def learn(self) -> list[Taught]:
        """What the policy shall say at each stage."""
        return [self._learn_stage(stage) for stage in reversed(range(len(self.stretches)))][::-1]

    def _learn_stage(self, stage: int) -> Taught:
        under = prefixes(self._drawn, self.stretches[:stage])
        looks = under.shape[1]
        rows, decided = np.repeat(self.rows, looks), under.reshape(-1, under.shape[2])
        shown, spent, come = self._looked(stage, rows, decided)
        # The FLOPs up to the next stage are known, so that those behind it are learned; at last there are none.
        rest = come[..., 0] - spent[..., None]
        targets = come[..., 1:] if self._is_last(stage) else torch.cat([rest[..., None], come[..., 1:]], dim=-1)
        targets = targets.flatten(1).clamp(0, 1)
        head = nn.Linear(HIDDEN, targets.shape[1])
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(targets.mean(dim=0).clamp(1e-4, 1 - 1e-4).logit())
        network = nn.Sequential(self.bodies[stage], head)
        looked = Looks(shown.unflatten(0, (-1, looks)), self.rows, self._read if self._tokens else None)
        wanted = targets.unflatten(0, (-1, looks))

        def loss(chosen: Tensor | slice) -> Tensor:
            said = network(looked.of(chosen))
            return F.binary_cross_entropy_with_logits(said, wanted[chosen].flatten(0, 1))

        self._fit(network, loss, f"imitation/risk_loss_{self.core.stages[stage]}")
        self._networks[stage] = network
        foreseen = self._foreseen(stage, looked.through(network), spent)
        if self._is_last(stage):
            risk = foreseen[:, :, 0, 1] - foreseen[:, :, 0, 2]
            steps = step_logits(risk - risk[:, :1], spent.mean(dim=0).double())
        else:
            steps = price_logits(costs(foreseen, self.log_prices.exp()), self.log_prices)
        return Taught(looked, (steps - self._log_multiplier).unflatten(0, (-1, looks)))

    def _is_last(self, stage: int) -> bool:
        return stage == len(self.stretches) - 1

    @torch.no_grad()
    def _looked(self, stage: int, rows: NDArray, decided: NDArray) -> tuple[Tensor, Tensor, Tensor]:
        """What rows show at a stage, and what its ways lead to.

        Returns:
            What is seen but tokens, ``[n, features]``; FLOPs ratios up to the next stage, ``[n, ways]``; and FLOPs
            ratio, quality lost and gained in the end, ``[n, ways, prices, 3]``, of the last stage for one price: it
            makes no difference.
        """
        core, found, order = self.core, [], []
        size = max(1, PASS_TOKENS // core.config.backbone.max_source_length)
        for part in batches(self.split.encoded.source_length[rows], size):
            observed, seen = core.stage_observation.observe(self.split, rows[part], stage, decided[part], None)
            come = [self._to_come(stage, rows[part], decided[part] + way, seen) for way in self.stretches[stage].ways]
            spent = self._spent(stage, rows[part], decided[part])
            shown = to_tensors(observed["stage"] if self._tokens else observed)
            found.append((self._sees(shown), spent, torch.stack(come, dim=1)))
            order.append(part)
            self._scored += len(part) * len(come)
            self._on_scored(self._scored)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        shown, spent, come = (torch.cat(of_each)[back] for of_each in zip(*found, strict=True))
        return shown, spent, come

    def _read(self, rows: NDArray) -> dict[str, Tensor]:
        """The tokens of rows ``[n]``."""
        return self._sees(to_tensors(self.core.observe(self.split, rows)))

    def _to_come(self, stage: int, rows: NDArray, decisions: NDArray, seen: PassState | None) -> Tensor:
        """FLOPs ratio, quality lost and gained, ``[n, prices, 3]``, behind decisions ``[n, components]`` of a stage."""
        core, behind = self.core, stage + 1
        if self._is_last(stage):
            outcome = core.score(self.split, rows, decisions, seen)
            lost = outcome.quality_ref - outcome.quality
            told = np.stack([outcome.flops_ratio, lost.clip(0, 1), (-lost).clip(0, 1)], axis=1)
            return torch.from_numpy(told.astype(np.float32))[:, None]
        observed, _ = core.stage_observation.observe(self.split, rows, behind, decisions, seen)
        spent = self._spent(behind, rows, decisions)
        with torch.no_grad():
            said = self._networks[behind](self._sees(to_tensors(observed)))
        foreseen = self._foreseen(behind, said, spent)
        return best(foreseen.expand(-1, -1, len(self.log_prices), -1), self.log_prices.exp())

    def _spent(self, stage: int, rows: NDArray, decided: NDArray) -> Tensor:
        """FLOPs ratio of each of a stage's ways if all behind the stage is skipped, ``[n, ways]``."""
        ratios, ends = [], self.core.steps.ends(stage)
        for way in self.stretches[stage].ways:
            ratios.append(self.split.costs.flops_ratio(rows, np.maximum(decided + way, ends)))
        return torch.from_numpy(np.stack(ratios, axis=1).astype(np.float32))

    def _foreseen(self, stage: int, said: Tensor, spent: Tensor) -> Tensor:
        """FLOPs ratio, quality lost and gained that a stage's ways end with, ``[n, ways, prices, 3]``; at last a price.

        Args:
            stage: Number of the stage.
            said: By the stage's network, ``[n, outputs]``.
            spent: FLOPs ratios up to the next stage, ``[n, ways]``.
        """
        last, spent = self._is_last(stage), spent[:, :, None, None]
        said = said.sigmoid().unflatten(1, (spent.shape[1], -1, 2 if last else 3))
        if last:
            return torch.cat([spent, said], dim=-1)
        return torch.cat([spent + said[..., :1], said[..., 1:]], dim=-1)
