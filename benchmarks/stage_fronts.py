"""Fronts of what ``stages.py`` compares: early exit, cascades, and policies that look in the middle of the pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.baselines.early_exit import THRESHOLDS
from sd_gym.agents.experiment.evaluation import deciding_flops, score_decisions, seen_together
from sd_gym.agents.report.fronts import Front, front_of_decisions
from sd_gym.agents.report.savings import margins

from sd_gym.envs.core import Core
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.batches import tensors


class Remembered:
    """A policy's logits at all that instances have shown, so that more cautious versions of it look at nothing twice.

    Args:
        core: The env's core.
        policy: As it was learned.
    """

    def __init__(self, core: Core, policy: DecisionPolicy) -> None:
        self.core, self.policy, self.split = core, policy, core.split("test")
        self.rows = np.arange(len(self.split))
        self._known: list[dict[tuple[int, bytes], torch.Tensor]] = [{} for _ in core.stages]

    def front(self, cautions: Sequence[float]) -> Front:
        """Of versions whose first stage, and whose every stage, is more cautious."""
        every = []
        for caution in cautions:

            def lost(margin: float, caution: float = caution) -> float:
                scored = score_decisions(self.core, self.split, self.rows, self.decisions(caution, margin))
                return float((scored["quality_ref"] - scored["quality"]).mean())

            every += [self.decisions(caution, one) for one in margins(lost, self.core.config.reward.epsilon)]
        own = deciding_flops(self.core, self.policy, self.split, self.rows)
        return front_of_decisions(self.core, self.split, every, [own] * len(every))

    @torch.inference_mode()
    def decisions(self, caution: float, margin: float) -> NDArray:
        """On all instances, ``[n, components]``."""
        core = self.core
        shift = more_cautious(self.policy, core.steps.components[0], caution).with_margin(margin).head.bias
        decided = np.zeros((len(self.rows), len(core.nvec)), dtype=np.int64)
        for stage in range(len(core.stages)):
            logits = self._logits(stage, decided) + (shift - self.policy.head.bias)
            core.steps.take(stage, decided, self.policy.choose(logits).numpy())
        return decided

    def _logits(self, stage: int, decided: NDArray) -> torch.Tensor:
        """At a stage, behind what is decided before it."""
        known = self._known[stage]
        keys = list(zip(self.rows.tolist(), map(bytes, decided.astype(np.uint8)), strict=True))
        new = np.array([row for row, key in enumerate(keys) if key not in known], dtype=np.int64)
        for part in seen_together(self.core, new) if len(new) else []:
            seen, _ = self.core.stage_observation.observe(self.split, part, stage, decided[part], None)
            known.update(zip([keys[row] for row in part], self.policy(tensors(seen)), strict=True))
        return torch.stack([known[key] for key in keys])


def more_cautious(policy: DecisionPolicy, components: NDArray, caution: float) -> DecisionPolicy:
    """The policy with more weight on running what some components stand for."""
    runs_all = np.cumsum([0, *policy.nvec[:-1]])[components]
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    weights["head.bias"][torch.from_numpy(runs_all)] += caution
    return policy.with_weights(weights)


def _scored(core: Core, decisions: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Quality, FLOPs and confidence ``[n]`` of one decision ``[switches + 1]`` for the whole test split."""
    split = core.split("test")
    rows = np.arange(len(split))
    tiled = np.tile(decisions, (len(rows), 1))
    scored = score_decisions(core, split, rows, tiled)
    return scored["quality"], scored["flops_ratio"], split.passes.confidence(rows, tiled)


def exit_front(core: Core, columns: Any) -> Front:
    """Early exit with each threshold: at every layer, or at the stages' columns."""
    board, split = core.backbone.board, core.split("test")
    starts = [c.start for c in (board.decided_at(board.stages).values() if columns is None else columns) if c.start]
    looks = []
    for end in [*starts, core.n_switches]:
        skip = np.pad((np.arange(core.n_switches) >= end).astype(np.int64), (0, 1))
        looks.append(_scored(core, skip))
    quality, flops, confidence = (np.stack(values) for values in zip(*looks, strict=True))
    rows = np.arange(len(split))
    judged = split.costs.head_flops(rows) / split.costs.dense_flops(rows)
    points = []
    for threshold in THRESHOLDS:
        sure = confidence >= threshold
        sure[-1] = True
        exits = sure.argmax(axis=0)
        points.append((quality[exits, rows], flops[exits, rows] + exits * judged))
    return _with_dense(points, quality[-1])


def cascade_front(core: Core, masks: list[NDArray]) -> Front:
    """Each mask with each threshold below which an input runs again, densely."""
    dense, _, _ = _scored(core, np.zeros_like(core.nvec))
    points = []
    for mask in np.unique(masks, axis=0):
        quality, flops, confidence = _scored(core, mask)
        for threshold in (0.0, *THRESHOLDS):
            unsure = confidence < threshold
            points.append((np.where(unsure, dense, quality), flops + unsure))
    return _with_dense(points, dense)


def _with_dense(points: list[tuple[NDArray, NDArray]], dense: NDArray) -> Front:
    quality, flops = (np.stack(values) for values in zip(*points, (dense, np.ones_like(dense)), strict=True))
    return Front(quality, flops)
