"""A cascade: a cheap pass for all inputs, and a dense pass where its head is unsure (Viola and Jones 2001).

The dense pass goes on from the first sublayer that the cheap one skipped, like the answer stage.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.baselines.early_exit import THRESHOLDS, Confidences
from sd_gym.agents.baselines.search import greedy_path
from sd_gym.agents.baselines.static import StaticSettings, nested_masks, report_scored, searched_masks
from sd_gym.agents.learning.agent import NotApplicableError, OnRollout, PrivilegedAgent
from sd_gym.agents.learning.decisions import SplitDecisions, Version, policy_rows
from stable_baselines3.common.logger import Logger

from sd_gym.envs.protocols import Split


@dataclass(frozen=True)
class CascadePoint:
    """One mask for all inputs; if the head is less sure than a threshold, the pass goes on densely."""

    mask: NDArray  # [components]
    threshold: float
    confidences: Confidences

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """The mask, or dense decisions; FLOPs beyond those of a dense pass count as deciding."""
        decisions = np.tile(self.mask, (len(rows), 1))
        unsure = self.confidences.of(split, rows, self.mask) < self.threshold
        costs = split.costs
        both = costs.flops(rows, decisions) + costs.going_on(rows, decisions)
        extra: NDArray = np.where(unsure, both - costs.dense_flops(rows), 0)
        return SplitDecisions(np.where(unsure[:, None], 0, decisions), extra)


class Cascade(PrivilegedAgent[StaticSettings]):
    """One mask for all inputs; if the head is less sure than a threshold, the pass goes on densely.

    The FLOPs of both passes count. Operating points are masks with thresholds; the masks are those of a greedy path
    on policy rows, or of a run of ``static`` (``path``). For backbones that classify.
    """

    Settings = StaticSettings
    draws = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.env.core.sees_confidence:
            raise NotApplicableError("a cascade needs a backbone that classifies, or a table with its confidences")
        self.masks = np.zeros((1, len(self.env.core.nvec)), dtype=np.int64)  # dense, until it has searched

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search a chain of nested masks on policy rows."""
        core = self.env.core
        if self.settings.path is not None:
            masks = np.unique(searched_masks(self.settings.path, core.nvec), axis=0)
        else:
            split, on_round = core.split("train"), partial(report_scored, on_rollout)
            masks = greedy_path(core, split, policy_rows(core), on_round, per=self.settings.per)
        self.masks = nested_masks(core, masks)

    def operating_points(self) -> list[Version]:
        """Each mask with each threshold."""
        confidences, masks = Confidences(), [mask for mask in self.masks if mask.any()]
        thresholds = [0.0, *THRESHOLDS[THRESHOLDS <= 1].tolist()]
        return [Version(CascadePoint(mask, threshold, confidences)) for mask in masks for threshold in thresholds]
