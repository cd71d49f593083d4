"""Confidence-based early exit: run layer by layer, and stop as soon as the head is sure (DeeBERT, Xin et al. 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import Decided, score_decisions
from sd_gym.agents.experiment.selection import keeps
from sd_gym.agents.experiment.verdict import ONE_SIDED_95
from sd_gym.agents.learning.agent import Decider, OnRollout
from stable_baselines3.common.logger import Logger

from sd_gym.envs.split import Split

THRESHOLDS = np.r_[np.linspace(0.5, 0.95, 10), 0.97, 0.98, 0.99, 0.995, 0.999, 1.01]  # above 1: never


class EarlyExit(Decider):
    """The layers behind an exit are skipped; the threshold of confidence is the lowest that keeps the quality.

    The backbone's own head judges at every exit, and its FLOPs count each time. For backbones that classify: where a
    text is generated there is no confidence in the whole before it stands.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.env.config.table is not None:
            raise ValueError("early exit looks at what the layers say, and a table has no backbone; train on its env")
        backbone = self.env.core.backbone
        if not backbone.head.sees_confidence or len(backbone.board.architecture.stacks) > 1:
            raise ValueError("early exit needs an encoder that classifies; this env's backbone is none")
        self.threshold = THRESHOLDS[-1]

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Choose the threshold on the validation split."""
        core = self.env.core
        split = core.split("validation")
        confidence, rows = self._confidence(split), np.arange(len(split))
        for threshold in THRESHOLDS:
            self.threshold = float(threshold)
            exits = self._exits(confidence)
            if keeps(core, score_decisions(core, split, rows, self._decisions(exits)), ONE_SIDED_95):
                return

    def decided(self, split: Split) -> Decided:
        """Exits at the first sure layer; each one before costs the head once more."""
        exits = self._exits(self._confidence(split))
        always = split.backbone.flops.costs(split.encoded.source_length)[0]
        return Decided(self._decisions(exits), exits * always)

    @property
    def _layers(self) -> NDArray:
        """The layer of each switch, ``[switches]``."""
        return np.array([switch.index for switch in self.env.core.backbone.board.switches])

    def _confidence(self, split: Split) -> NDArray:
        """Highest class probability after each layer, ``[n, layers]``."""
        rows, layers = np.arange(len(split)), np.unique(self._layers)
        return np.stack(
            [split.passes.confidence(rows, self._decisions(np.full(len(split), layer))) for layer in layers],
            axis=1,
        )

    def _exits(self, confidence: NDArray) -> NDArray:
        """The last layer that each instance runs, int64 ``[n]``."""
        sure = confidence >= self.threshold
        sure[:, -1] = True
        return sure.argmax(axis=1)

    def _decisions(self, exits: NDArray) -> NDArray:
        skip = self._layers[None] > exits[:, None]
        return np.pad(skip, ((0, 0), (0, 1))).astype(np.int64)
