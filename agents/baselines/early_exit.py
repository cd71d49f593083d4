"""Early exit by confidence: run layer by layer, and stop as soon as the head is sure (DeeBERT, Xin et al. 2020)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.learning.agent import AgentSettings, NotApplicableError, PrivilegedAgent
from sd_gym.agents.learning.decisions import SplitDecisions, Version, policy_rows, score_masks

from sd_gym.envs.protocols import Split
from sd_gym.going_on import stages_of_pass

if TYPE_CHECKING:
    from sd_gym.execution.split import BackboneSplit

THRESHOLDS = np.r_[np.linspace(0.5, 0.95, 10), 0.97, 0.98, 0.99, 0.995, 0.999, 1.01]  # above 1: never
SWEEPS = 2  # over all stages, to lower their thresholds
ALLOWED = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)  # losses on policy rows, in epsilons, at which thresholds are searched


class EarlyExit(PrivilegedAgent[AgentSettings]):
    """Skips the layers after an exit; the confidence threshold is the lowest that keeps the quality.

    The backbone's own head runs at every exit, and its FLOPs count each time. For backbones that classify.
    """

    draws = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (self.env.core.mask_nvec[:-1] < 2).any():
            raise NotApplicableError("early exit skips whole layers, and the env's candidates are not all sublayers")
        if not self.env.core.can_exit:
            raise NotApplicableError(
                "early exit and confidence need an encoder that classifies; neither tables nor this env have one"
            )
        self._known: dict[tuple[str, bytes], NDArray] = {}  # confidences of rows of a split

    def operating_points(self) -> list[Version]:
        """One point per threshold."""
        exits = len(self._ends)
        return [Version(Exit(self, np.full(exits, threshold))) for threshold in THRESHOLDS if threshold <= 1]

    def confidence(self, split: Split, rows: NDArray) -> NDArray:
        """Highest class probability at each exit, float64 ``[n, exits]``; it is computed once."""
        key, of_backbone = (split.name, rows.tobytes()), cast("BackboneSplit", split)  # as the core can exit
        if key not in self._known:
            masks = self.env.core.to_masks(self.decisions(np.arange(len(self._ends))))
            parts = [of_backbone.passes.confidence(rows, np.tile(mask, (len(rows), 1))) for mask in masks]
            self._known[key] = np.stack(parts, axis=1)
        return self._known[key]

    def decisions(self, exits: NDArray) -> NDArray:
        """Decisions ``[n, components]`` that skip everything after the exits ``[n]``."""
        skip = np.arange(self.env.core.n_switches) >= self._ends[exits][:, None]
        return self.env.core.from_masks(np.pad(skip, ((0, 0), (0, 1))).astype(np.int64))

    @property
    def _ends(self) -> NDArray:
        """Number of switches in front of each exit, int64 ``[exits]``: one per layer; the last exit is the end."""
        board = self.env.core.backbone.board
        return np.array([columns.stop for columns in board.decided_at(board.stages).values()])


@dataclass(frozen=True)
class Exit:
    """Leaves at the first exit whose confidence reaches its threshold; each earlier exit costs the head once."""

    agent: EarlyExit
    thresholds: NDArray  # [exits]

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """Decisions that skip all later layers."""
        exits = exits_of(self.agent.confidence(split, rows), self.thresholds)
        return SplitDecisions(self.agent.decisions(exits), exits * split.costs.head_flops(rows))


def exits_of(confidence: NDArray, thresholds: NDArray) -> NDArray:
    """The exit of each row, int64 ``[n]``, of confidences ``[n, exits]``; the last exit is the end."""
    sure = confidence >= thresholds
    sure[:, -1] = True
    return sure.argmax(axis=1)


class Confidence(EarlyExit):
    """Early exit at the stages of an env, with a threshold for each.

    For each of several losses on policy rows, the search starts from the best single threshold, and lowers the
    threshold of one stage after another as far as that loss allows. These and the single thresholds are the operating
    points.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self._ends) == 1:
            raise NotApplicableError("confidence decides at the stages of an env, but this one has none; pass stages")

    def operating_points(self) -> list[Version]:
        """Thresholds of all stages, searched on policy rows."""
        core = self.env.core
        split = self.env.core.split("train")
        n = len(self._ends)
        rows = policy_rows(core)
        confidence = self.confidence(split, rows)
        scored = score_masks(core, split, rows, self.decisions(np.arange(n)))
        losses, flops = scored["quality_ref"] - scored["quality"], scored["flops_ratio"]
        judging, every = split.costs.head_flops(rows) / split.costs.dense_flops(rows), np.arange(len(rows))

        def mean_flops(thresholds: NDArray, allowed: float) -> float:
            """Mean FLOPs ratio of thresholds ``[exits]``; infinite if more than ``allowed`` is lost."""
            exits = exits_of(confidence, thresholds)
            lost = losses[exits, every].mean()
            return float((flops[exits, every] + exits * judging).mean()) if lost <= allowed else np.inf

        searched = []
        for allowed in core.config.reward.epsilon * np.array(ALLOWED):
            best = min(
                (np.full(n, single) for single in THRESHOLDS), key=lambda thresholds: mean_flops(thresholds, allowed)
            )
            for number in [*range(n - 1)] * SWEEPS:
                tried = [np.where(np.arange(n) == number, threshold, best) for threshold in THRESHOLDS]
                best = min(tried, key=lambda thresholds: mean_flops(thresholds, allowed))
            searched.append(Version(Exit(self, best)))
        return [*super().operating_points(), *searched]

    @property
    def _ends(self) -> NDArray:
        core = self.env.core
        stages = core.backbone.board.decided_at(stages_of_pass(core.stages)).values()
        starts = [columns.start for columns in stages if columns.start]
        return np.array([*starts, core.n_switches])
