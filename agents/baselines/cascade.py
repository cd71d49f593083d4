"""A cascade: a cheap pass for all, and a dense one for those that it is not sure of (Viola and Jones 2001)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.baselines.early_exit import THRESHOLDS, confidence_of
from sd_gym.agents.baselines.search import greedy_path, nested_codebook
from sd_gym.agents.baselines.static import StaticSettings, report_scored, searched_masks
from sd_gym.agents.learning.agent import NotApplicableError, OnRollout, PrivilegedAgent, SplitDecisions
from sd_gym.agents.learning.decisions import halves, keeps_quality, score_decisions
from sd_gym.agents.runs.verdict import ONE_SIDED_95
from stable_baselines3.common.logger import Logger

from sd_gym.envs.protocols import Split


class Cascade(PrivilegedAgent[StaticSettings]):
    """One mask for all inputs; where the head is less sure than a threshold, the input runs again, densely.

    Both runs count. The masks are those of a greedy path (or of a run of ``static``: ``path``), searched on the first
    half of the validation split; of all masks and thresholds, the cheapest is kept that keeps the quality on either
    half. For backbones that classify.
    """

    Settings = StaticSettings
    draws = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.env.core.sees_confidence:
            raise NotApplicableError("a cascade needs a backbone that classifies, which no table has, nor this env")
        self.mask = np.zeros_like(self.env.core.nvec)  # dense, and never again
        self.threshold = 0.0

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Choose the mask and the threshold on the validation split."""
        core, split = self.env.core, self.env.core.split("validation")
        rows, parts = np.arange(len(split)), halves(split)
        if self.settings.path is not None:
            masks = np.unique(searched_masks(self.settings.path, core.nvec), axis=0)
        else:
            masks = np.stack(greedy_path(core, split, parts[0], lambda scored: report_scored(on_rollout, scored)))
        tiled = [np.tile(mask, (len(rows), 1)) for mask in masks]
        scored = [score_decisions(core, split, rows, decisions) for decisions in tiled]
        quality, flops_ratio = (
            np.array([of_mask[name][parts[0]].mean() for of_mask in scored]) for name in ("quality", "flops_ratio")
        )
        candidates = []
        for number in nested_codebook(masks, quality, flops_ratio):
            confidence = confidence_of(split, rows, tiled[number])
            for threshold in (0.0, *THRESHOLDS):
                unsure = confidence < threshold
                flops = scored[number]["flops_ratio"] + unsure
                candidates.append((float(flops[parts[0]].mean()), number, float(threshold), unsure))
        for _, number, threshold, unsure in sorted(candidates, key=lambda candidate: candidate[0]):
            reference = scored[number]["quality_ref"]
            answered = np.where(unsure, reference, scored[number]["quality"])
            samples = [{"quality": answered[part], "quality_ref": reference[part]} for part in parts]
            if all(keeps_quality(core, sample, ONE_SIDED_95) for sample in samples):
                self.mask, self.threshold = masks[number], threshold
                return

    def decide_split(self, split: Split) -> SplitDecisions:
        """The mask, or nothing skipped; the first run of those that run twice is the cost of deciding."""
        rows = np.arange(len(split))
        decisions = np.tile(self.mask, (len(rows), 1))
        unsure = confidence_of(split, rows, decisions) < self.threshold
        spent: NDArray = np.where(unsure, split.costs.flops(rows, decisions), 0)
        return SplitDecisions(np.where(unsure[:, None], 0, decisions), spent)
