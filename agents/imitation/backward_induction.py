"""Imitation at several stages: from the last stage back, each learns the outcomes of its choices.

The masks of a path, cut at the stages, give each stage a few choices ("ways"), each skipping one more candidate. The
last stage's ways are scored, and a network learns the risk of each from the stage's observation. For an earlier stage a
network learns the final FLOPs and loss of each way, after the decisions of later stages, which observe more, at several
prices of a lost instance (backward induction; Bellman 1957). So a stage runs what the next one needs to observe, if
that pays later, and skips at once if it is sure. The logit of each step of a stage is the price up to which it pays. A
margin on the logits of all stages is another price.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.imitation.path_logits import accepting_logits, step_logits
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.envs.protocols import Core
from sd_gym.execution.passes import PASS_TOKENS
from sd_gym.policy import HIDDEN
from sd_gym.policy.observations import to_tensors
from sd_gym.switch import PassState

ANSWERS = 8  # observations ("looks") of each instance at the answer stage, under as many masks
AT_ONCE = 256  # instances whose tokens are embedded at once
LOG_PRICES = torch.linspace(-3, 6, 13)  # prices of a lost instance over the env's own, for earlier stages
Loss = Callable[[Tensor | slice], Tensor]  # of some instances


class StageChoices(NamedTuple):
    """The choices of a stage."""

    components: NDArray  # the stage's own components of a decision, int64
    # Decisions, 0 for other components, each skipping one more candidate, dense first: int64 [ways, nvec]. At the
    # answer stage: go on, and accept.
    ways: NDArray


class StageObservations(NamedTuple):
    """Observations of instances at a stage, under the same number of earlier decisions each (looks)."""

    flat: Tensor  # without tokens, float32 [n, looks, features]
    rows: NDArray  # of the instances, int64 [n]
    tokens: Callable[[NDArray], Any] | None  # embeds tokens of rows; None: none are observed

    def of(self, chosen: Tensor | slice) -> Tensor | dict[str, Tensor]:
        """Observations of some instances, with the looks of each in a row; they have the same tokens."""
        flat = self.flat[chosen].flatten(0, 1)
        return flat if self.tokens is None else {"stage": flat, **self.tokens(self.rows[chosen])}

    @torch.no_grad()
    def through(self, network: nn.Module) -> Tensor:
        """Outputs of a network on all instances, ``[n * looks, outputs]``."""
        size = len(self.flat) if self.tokens is None else AT_ONCE
        return torch.cat([network(self.of(part)) for part in torch.arange(len(self.flat)).split(size)])


def stage_choices(core: Core, path: NDArray) -> list[StageChoices]:
    """The parts of a path of masks ``[masks, components]`` that each stage of a core decides."""
    stages = []
    for components in core.steps.components:
        ways = np.zeros_like(path)
        ways[:, components] = path[:, components]
        changes = np.append(True, (ways[1:] != ways[:-1]).any(axis=1))
        stages.append(StageChoices(components, ways[changes]))
    if core.has_answer_stage:
        both = np.zeros((2, path.shape[1]), dtype=np.int64)
        both[0, -1] = 1
        stages[-1] = stages[-1]._replace(ways=both)
    return stages


def earlier_decisions(
    n: int, components: int, before: Sequence[StageChoices], random: np.random.Generator, *, answers: bool
) -> NDArray:
    """Earlier decisions for the observations of ``n`` instances at a stage, int64 ``[n, looks, components]``.

    A middle stage has two looks: dense, and a random way of each stage ``before`` it. The value of an answer depends on
    everything that was skipped, so the answer stage has ``ANSWERS`` random looks. The first stage has one look.
    """
    looks = ANSWERS if answers else min(len(before), 1)
    drawn = np.zeros((n, looks, components), dtype=np.int64)
    for choices in before:
        drawn += choices.ways[random.integers(len(choices.ways), size=(n, looks))]
    return drawn if answers else np.concatenate([np.zeros((n, 1, components), dtype=np.int64), drawn], axis=1)


def mean_head(targets: Tensor) -> nn.Linear:
    """A layer from ``HIDDEN`` features to log-odds, initially those of the means of ``targets [n, outputs]``."""
    head = nn.Linear(HIDDEN, targets.shape[1])
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(targets.mean(dim=0).clamp(1e-4, 1 - 1e-4).logit())
    return head


def best(outcomes: Tensor, prices: Tensor) -> Tensor:
    """The outcome of the best way at each of ``prices``, ``[n, prices, 3]``.

    Outcomes of each way are FLOPs ratio, quality lost and quality gained, ``[n, ways, prices, 3]``.
    """
    chosen = costs(outcomes, prices).argmin(dim=1)
    return outcomes.gather(1, chosen[:, None, :, None].expand(-1, 1, -1, 3))[:, 0]


def costs(outcomes: Tensor, prices: Tensor) -> Tensor:
    """FLOPs ratio plus the price of the lost quality, ``[n, ways, prices]``; see ``best``."""
    flops, losing, gaining = outcomes.unbind(dim=-1)
    return flops + prices * (losing - gaining)


def price_logits(cost: Tensor, log_prices: Tensor) -> Tensor:
    """Logarithm of the price up to which each step of a stage pays: some way after it is better than all before it.

    Args:
        cost: Of each way at each price, ``[n, ways, prices]``.
        log_prices: Logarithms of the prices, evenly spaced and rising.

    Returns:
        float32 ``[n, ways - 1]``, not rising along the ways. Half an interval beyond the prices: it always or never
        pays.
    """
    before = cost.cummin(dim=1).values[:, :-1]
    after = cost.flip(1).cummin(dim=1).values.flip(1)[:, 1:]
    gain = (before - after) / (log_prices / 2).exp()
    pays = (gain > 0).long().cumprod(dim=2).sum(dim=2)  # number of prices, from the lowest one
    last, following = (gain.gather(2, (pays + shift).clamp(0, len(log_prices) - 1)[..., None]) for shift in (-1, 0))
    last, following = last[..., 0], following[..., 0]
    inside = (pays > 0) & (pays < len(log_prices))
    share = torch.where(inside, last / (last - following).clamp(min=1e-12), 0.5)  # of the interval after the last one
    return log_prices[0] + (log_prices[1] - log_prices[0]) * (pays - 1 + share)


@dataclass(eq=False)
class BackwardInduction:
    """Learns the outcomes of each stage's ways, from the last stage back."""

    core: Core
    rows: NDArray  # of the training split, int64 [n]
    path: NDArray  # masks from dense to nothing, int64 [masks, components]
    bodies: Sequence[nn.Module]  # for each stage, from observations to HIDDEN features
    fit: Callable[[nn.Module, Loss, str], None]  # minimises a loss of a module, logged under a tag
    visible: Callable[[Tensor | dict[str, Tensor]], Tensor | dict[str, Tensor]]  # the observations that the agent uses
    tokens: bool  # whether tokens are observed
    on_scored: Callable[[int], None]  # called with the decisions scored so far
    seed: int  # of the random earlier decisions

    def __post_init__(self) -> None:
        self.split, self.stage_choices = self.core.split("train"), stage_choices(self.core, self.path)
        self._random = np.random.default_rng(self.seed)
        self._scored = 0
        self._log_multiplier = math.log(self.core.config.reward.penalty / self.core.config.reward.cost_scale)
        self.log_prices = LOG_PRICES + self._log_multiplier
        self._networks: dict[int, nn.Module] = {}  # by stage, predicting the outcomes of its ways

    def learn(self) -> list[tuple[StageObservations, Tensor]]:
        """Observations at each stage, and target logits of its steps for the policy, ``[n, looks, ways - 1]``."""
        return [self._learn_stage(stage) for stage in reversed(range(len(self.stage_choices)))][::-1]

    def _learn_stage(self, stage: int) -> tuple[StageObservations, Tensor]:
        answers = self._is_last(stage) and self.core.has_answer_stage
        before = self.stage_choices[:stage]
        under = earlier_decisions(len(self.rows), self.path.shape[1], before, self._random, answers=answers)
        looks = under.shape[1]
        rows, decisions = np.repeat(self.rows, looks), under.reshape(-1, under.shape[2])
        flat, spent, outcomes = self._scored_ways(stage, rows, decisions)
        # FLOPs up to the next stage are known, so only later ones are learned; the last stage has none.
        targets = outcomes[..., 1:]
        if not self._is_last(stage):
            targets = torch.cat([(outcomes[..., 0] - spent[..., None])[..., None], targets], dim=-1)
        targets = targets.flatten(1).clamp(0, 1)
        network = nn.Sequential(self.bodies[stage], mean_head(targets))
        tokens = self._read_tokens if self.tokens else None
        observations = StageObservations(flat.unflatten(0, (-1, looks)), self.rows, tokens)
        targets = targets.unflatten(0, (-1, looks))

        def loss(chosen: Tensor | slice) -> Tensor:
            outputs = network(observations.of(chosen))
            return F.binary_cross_entropy_with_logits(outputs, targets[chosen].flatten(0, 1))

        self.fit(network, loss, f"imitation/risk_loss_{self.core.stages[stage]}")
        self._networks[stage] = network
        predicted = self._predicted(stage, observations.through(network), spent)
        if self._is_last(stage):
            risk = predicted[:, :, 0, 1] - predicted[:, :, 0, 2]
            added = risk - risk[:, :1]
            if answers:  # the cost of going on depends on the earlier decisions
                steps = accepting_logits(added[:, 1:], spent[:, :1] - spent[:, 1:])
            else:
                steps = step_logits(added, spent.mean(dim=0).double())
        else:
            steps = price_logits(costs(predicted, self.log_prices.exp()), self.log_prices)
        return observations, (steps - self._log_multiplier).unflatten(0, (-1, looks))

    def _is_last(self, stage: int) -> bool:
        return stage == len(self.stage_choices) - 1

    @torch.no_grad()
    def _scored_ways(self, stage: int, rows: NDArray, decisions: NDArray) -> tuple[Tensor, Tensor, Tensor]:
        """Flat observations ``[n, features]`` of rows at a stage, and the outcomes of its ways.

        Outcomes are FLOPs ratios up to the next stage, ``[n, ways]``; and final FLOPs ratio, quality lost and gained,
        ``[n, ways, prices, 3]``. The last stage has a single price, as its outcomes do not depend on it.
        """
        core, results = self.core, []
        ways = self.stage_choices[stage].ways
        size = max(1, PASS_TOKENS // core.config.backbone.max_source_length)
        order = np.argsort(self.split.encoded.source_length[rows], kind="stable")  # batches of about the same length
        for part in np.split(order, range(size, len(order), size)):
            observed, state = core.stage_observation.observe(self.split, rows[part], stage, decisions[part], None)
            outcomes = [self._outcomes(stage, rows[part], decisions[part] + way, state) for way in ways]
            spent = self._spent(stage, rows[part], decisions[part])
            flat = to_tensors(observed["stage"] if isinstance(observed, dict) else observed)
            results.append((self.visible(flat), spent, torch.stack(outcomes, dim=1)))
            self._scored += len(part) * len(ways)
            self.on_scored(self._scored)
        back = torch.from_numpy(np.argsort(order))
        flat, spent, outcomes = (torch.cat(parts)[back] for parts in zip(*results, strict=True))
        return flat, spent, outcomes

    def _read_tokens(self, rows: NDArray) -> Any:
        return self.visible(to_tensors(self.core.observe(self.split, rows)))

    def _outcomes(self, stage: int, rows: NDArray, decisions: NDArray, state: PassState | None) -> Tensor:
        """Final FLOPs ratio, quality lost and gained, ``[n, prices, 3]``, of decisions up to a stage."""
        core, following = self.core, stage + 1
        if self._is_last(stage):
            outcome = core.score(self.split, rows, decisions, state)
            columns = np.stack([outcome.flops_ratio, outcome.cost.clip(0, 1), (-outcome.cost).clip(0, 1)], axis=1)
            return torch.from_numpy(columns.astype(np.float32))[:, None]
        observed, _ = core.stage_observation.observe(self.split, rows, following, decisions, state)
        with torch.no_grad():
            outputs = self._networks[following](self.visible(to_tensors(observed)))
        predicted = self._predicted(following, outputs, self._spent(following, rows, decisions))
        return best(predicted.expand(-1, -1, len(self.log_prices), -1), self.log_prices.exp())

    def _spent(self, stage: int, rows: NDArray, decisions: NDArray) -> Tensor:
        """FLOPs ratio of each of a stage's ways if everything after the stage is skipped, ``[n, ways]``."""
        ends, ways = self.core.steps.ends(stage), self.stage_choices[stage].ways
        ratios = [self.split.costs.flops_ratio(rows, np.maximum(decisions + way, ends)) for way in ways]
        return torch.from_numpy(np.stack(ratios, axis=1).astype(np.float32))

    def _predicted(self, stage: int, outputs: Tensor, spent: Tensor) -> Tensor:
        """Predicted FLOPs ratio, quality lost and gained of a stage's ways, ``[n, ways, prices, 3]``.

        ``outputs [n, outputs]`` are those of the stage's network, ``spent [n, ways]`` FLOPs ratios up to the next one.
        """
        last, spent = self._is_last(stage), spent[:, :, None, None]
        values = outputs.sigmoid().unflatten(1, (spent.shape[1], -1, 2 if last else 3))
        if last:
            return torch.cat([spent, values], dim=-1)
        return torch.cat([spent + values[..., :1], values[..., 1:]], dim=-1)
