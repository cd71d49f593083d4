"""Confidence-based early exit: run layer by layer, and stop as soon as the head is sure (DeeBERT, Xin et al. 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.learning.agent import AgentSettings, NotApplicableError, OnRollout, PrivilegedAgent, SplitDecisions
from sd_gym.agents.learning.decisions import halves, keeps_quality, score_decisions
from sd_gym.agents.runs.verdict import ONE_SIDED_95
from stable_baselines3.common.logger import Logger

from sd_gym.envs.protocols import Split
from sd_gym.execution.split import BackboneSplit

THRESHOLDS = np.r_[np.linspace(0.5, 0.95, 10), 0.97, 0.98, 0.99, 0.995, 0.999, 1.01]  # above 1: never
SWEEPS = 2  # over all stages, to lower their thresholds


class EarlyExit(PrivilegedAgent[AgentSettings]):
    """The layers after an exit are skipped; the threshold of confidence is the lowest that keeps the quality.

    The backbone's own head judges at every exit, and its FLOPs count each time. For backbones that classify.
    """

    draws = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (self.env.core.nvec[:-1] < 2).any():
            raise NotApplicableError("early exit skips whole layers, and the env's candidates are not all sublayers")
        if not self.env.core.can_exit:
            raise NotApplicableError("early exit runs an encoder that classifies, which no table has, nor this env")
        self.threshold: float | NDArray = THRESHOLDS[-1]  # one of all looks, or of each, ``[looks]``

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Choose the threshold on the validation split."""
        core, split = self.env.core, self.env.core.split("validation")
        confidence, rows = self._confidence(split), np.arange(len(split))
        for threshold in THRESHOLDS:
            self.threshold = float(threshold)
            decisions = self._decisions(self._exits(confidence))
            if keeps_quality(core, score_decisions(core, split, rows, decisions), ONE_SIDED_95):
                return

    def decide_split(self, split: Split) -> SplitDecisions:
        """Exits at the first sure layer; each one before costs the head once more."""
        exits = self._exits(self._confidence(split))
        always = self.env.core.backbone.flops.costs(split.encoded.source_length)[0]
        return SplitDecisions(self._decisions(exits), exits * always)

    @property
    def _ends(self) -> NDArray:
        """How many switches have run at each look, the last one behind them all, int64 ``[looks]``: at every layer."""
        board = self.env.core.backbone.board
        return np.array([columns.stop for columns in board.decided_at(board.stages).values()])

    def _confidence(self, split: Split) -> NDArray:
        """Highest class probability at each look, ``[n, looks]``."""
        rows = np.arange(len(split))
        exits = [self._decisions(np.full(len(rows), look)) for look in range(len(self._ends))]
        return np.stack([confidence_of(split, rows, decisions) for decisions in exits], axis=1)

    def _exits(self, confidence: NDArray) -> NDArray:
        """The look that each instance leaves at, int64 ``[n]``."""
        sure = confidence >= self.threshold
        sure[:, -1] = True
        return sure.argmax(axis=1)

    def _decisions(self, exits: NDArray) -> NDArray:
        skip = np.arange(self.env.core.n_switches) >= self._ends[exits][:, None]
        return np.pad(skip, ((0, 0), (0, 1))).astype(np.int64)


class Confidence(EarlyExit):
    """Early exit at the stages of an env, with a threshold for each.

    From the best single threshold, that of one stage after the other is lowered as far as the quality allows on the
    first half of the validation split. The result has to be confirmed on the other half, or the single one stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.env.core.is_staged:
            raise NotApplicableError("confidence looks at the stages of an env, and this one has none; pass stages")

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Choose the thresholds on the validation split."""
        super().learn(total_steps, logger, on_rollout)
        core, split = self.env.core, self.env.core.split("validation")
        rows, looks, single = np.arange(len(split)), len(self._ends), self.threshold
        confidence = self._confidence(split)
        exits = [self._decisions(np.full(len(rows), look)) for look in range(looks)]
        at_look = [score_decisions(core, split, rows, decisions) for decisions in exits]
        quality, flops = (np.stack([scored[name] for scored in at_look]) for name in ("quality", "flops_ratio"))
        judged = split.costs.head_flops(rows) / split.costs.dense_flops(rows)
        searched, unseen = halves(split)

        def price(part: NDArray) -> float:
            """Mean FLOPs on some rows; infinite if the quality is not kept there."""
            exits = self._exits(confidence[part])
            scored = {"quality": quality[exits, part], "quality_ref": at_look[0]["quality_ref"][part]}
            kept = keeps_quality(core, scored, ONE_SIDED_95)
            return float((flops[exits, part] + exits * judged[part]).mean()) if kept else np.inf

        before = price(unseen)
        best = np.full(looks, float(single))
        for look in [*range(looks - 1)] * SWEEPS:
            tried = []
            for threshold in THRESHOLDS:
                self.threshold = np.where(np.arange(looks) == look, threshold, best)
                tried.append(price(searched))
            if np.isfinite(min(tried)):
                best[look] = THRESHOLDS[int(np.argmin(tried))]
        self.threshold = best
        if not price(unseen) < before:
            self.threshold = single

    @property
    def _ends(self) -> NDArray:
        """At the stages of the env."""
        core = self.env.core
        starts = [columns.start for columns in core.backbone.board.decided_at(core.stages).values() if columns.start]
        return np.array([*starts, core.n_switches])


def confidence_of(split: Split, rows: NDArray, decisions: NDArray) -> NDArray:
    """Highest class probability of rows under decisions, float64 ``[n]``, of a split of a backbone that classifies."""
    assert isinstance(split, BackboneSplit)  # agents that ask for it refuse tables when they are made
    return split.passes.confidence(rows, decisions)
