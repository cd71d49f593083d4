"""A cascade: a cheap pass for all, and a dense one for those that it is not sure of (Viola and Jones 2001).

The dense pass goes on from in front of the first sublayer that the cheap one skipped, as the answer stage does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.baselines.early_exit import THRESHOLDS, Confidences
from sd_gym.agents.baselines.search import greedy_path, nested_codebook
from sd_gym.agents.baselines.static import StaticSettings, report_scored, searched_masks
from sd_gym.agents.learning.agent import NotApplicableError, OnRollout, PrivilegedAgent
from sd_gym.agents.learning.decisions import SplitDecisions, Version, policy_rows, score_decisions
from stable_baselines3.common.logger import Logger

from sd_gym.envs.protocols import Split


@dataclass(frozen=True)
class CascadePoint:
    """One mask for all inputs; where the head is less sure than a threshold, the pass goes on densely."""

    mask: NDArray  # [components]
    threshold: float
    confidences: Confidences

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """The mask, or nothing skipped; what going on takes more than a dense pass is the cost of deciding."""
        decisions = np.tile(self.mask, (len(rows), 1))
        unsure = self.confidences.of(split, rows, self.mask) < self.threshold
        costs = split.costs
        both = costs.flops(rows, decisions) + costs.going_on(rows, decisions)
        spent: NDArray = np.where(unsure, both - costs.dense_flops(rows), 0)
        return SplitDecisions(np.where(unsure[:, None], 0, decisions), spent)


class Cascade(PrivilegedAgent[StaticSettings]):
    """One mask for all inputs; where the head is less sure than a threshold, the pass goes on densely.

    Both count. The masks are those of a greedy path (or of a run of ``static``: ``path``), searched on policy
    rows; masks with thresholds are the operating points. For backbones that classify.
    """

    Settings = StaticSettings
    draws = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.env.core.sees_confidence:
            raise NotApplicableError("a cascade needs a backbone that classifies, or a table of its judgements")
        self.masks = np.zeros((1, len(self.env.core.nvec)), dtype=np.int64)  # dense, before it has searched

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search the masks on policy rows: a chain in which each skips all that the one before skips, and more."""
        core, split, rows = self.env.core, self.env.core.split("train"), policy_rows(self.env.core)
        if self.settings.path is not None:
            masks = np.unique(searched_masks(self.settings.path, core.nvec), axis=0)
        else:
            masks = np.stack(greedy_path(core, split, rows, lambda scored: report_scored(on_rollout, scored)))
        scored = [score_decisions(core, split, rows, np.tile(mask, (len(rows), 1))) for mask in masks]
        quality, flops = (np.array([of_mask[name].mean() for of_mask in scored]) for name in ("quality", "flops_ratio"))
        self.masks = masks[nested_codebook(masks, quality, flops)]

    def operating_points(self) -> list[Version]:
        """Each mask with each threshold."""
        confidences = Confidences()
        thresholds = [0.0, *THRESHOLDS[THRESHOLDS <= 1]]
        masks = [mask for mask in self.masks if mask.any()]
        return [Version(CascadePoint(mask, float(one), confidences)) for mask in masks for one in thresholds]
