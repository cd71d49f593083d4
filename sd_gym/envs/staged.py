"""Episodes of one or more steps: how far each of a batch has come, what it sees there, and what it has decided."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from sd_gym.envs.spaces import OBSERVATION_LIMIT, Observations, deviation_of
from sd_gym.policy.observation import at_stage, features_of, log_odds
from sd_gym.switch import Seen
from sd_gym.tasks.ranking import STATISTICS_SIZE

if TYPE_CHECKING:
    from sd_gym.envs.core import Core, Outcome
    from sd_gym.envs.split import Split

Array = NDArray
PASS_ROWS = 64  # of a pass that statistics are taken from


class StageObservation:
    """What is seen at the stages of an episode: which stage it is, and what the pass has computed so far.

    ``Box(-10, 10, (stages + 1 + 2 * width + 2,), float32)``: the stage, one-hot; the share of the dense FLOPs that the
    pass will have taken if all that is left is skipped and an answer has one token; mean and maximum over positions of
    the hidden states there, the number of positions and its logarithm. Where the head can judge what a layer gives
    (``Backbone.can_exit``) there is one number more: the log-odds of its answer there, 0 before the first layer. All
    but the stage and the FLOPs is standardised for each stage by a dense pass over the first 2,000 instances of the
    training split.

    Args:
        core: The core.
    """

    def __init__(self, core: Core) -> None:
        self.names, self.columns = core.stages, core.columns
        self.judges = core.backbone.can_exit
        split = core.split("train")
        rows = np.arange(min(len(split), STATISTICS_SIZE))
        features = np.concatenate(
            [np.stack(list(self._dense(split, part))) for part in np.split(rows, rows[PASS_ROWS::PASS_ROWS])], axis=1
        )
        self.mean, self.deviation = features.mean(axis=1), deviation_of(features.std(axis=1))
        size = len(self.names) + 1 + features.shape[2]
        self.space = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, (size,), np.float32)

    def observe(
        self, split: Split, rows: Array, stage: int, decisions: Array, behind: Seen | None
    ) -> tuple[Array, Seen | None]:
        """What is seen of rows ``[n]`` that have come to a stage under decisions ``[n, switches + 1]``.

        Args:
            split: Where the instances are.
            rows: Their rows.
            stage: Number of the stage.
            decisions: As far as they are made; the switches from the stage on do not count.
            behind: What the same rows have shown at the stage before, if it is known.

        Returns:
            Observations, float32 ``[n, size]``, and what to go on from; ``None`` before the first layer.
        """
        features, seen = self._features(split, rows, stage, decisions, behind)
        exits = decisions.copy()
        exits[:, self.columns[stage].start : -1] = 1
        share = split.costs.reading_ratio(rows, exits)
        return at_stage(stage, share, features, self.mean, self.deviation), seen

    def judging_flops(self, split: Split, rows: Array) -> Array:
        """FLOPs of the head's judgements in one episode of each row, int64 ``[n]``."""
        times = sum(name != "first" for name in self.names) if self.judges else 0
        return times * split.costs.head_flops(rows)

    def _dense(self, split: Split, rows: Array) -> Iterator[Array]:
        """Features of each stage of a dense pass, ``[n, features]``."""
        decisions, seen = np.zeros((len(rows), len(split.backbone.board) + 1), dtype=np.int64), None
        for stage in range(len(self.names)):
            features, seen = self._features(split, rows, stage, decisions, seen)
            yield features

    def _features(
        self, split: Split, rows: Array, stage: int, decisions: Array, behind: Seen | None
    ) -> tuple[Array, Seen | None]:
        judged = np.zeros((len(rows), int(self.judges)), dtype=np.float32)
        if self.names[stage] == "first":
            return np.concatenate([split.features[rows], judged], axis=1), None
        seen = split.passes.seen_at(self.names[stage], rows, decisions, behind)
        if self.judges:
            judged[:, 0] = log_odds(split.passes.confidence_at(seen, rows, decisions))
        return np.concatenate([features_of(seen.hidden, seen.mask).float().cpu().numpy(), judged], axis=1), seen


class Episodes:
    """A batch of episodes, each of one instance: a step is a stage, which decides the switches up to the next one.

    Args:
        core: The core.
        n: How many there are.

    Attributes:
        stage: At which stage each is, int64 ``[n]``; behind the last one it is over.
        decisions: What is decided so far, int64 ``[n, switches + 1]``; what is not runs.
        paid: Reward that each was given for savings, float64 ``[n]``.
    """

    def __init__(self, core: Core, n: int) -> None:
        self.core = core
        self.stage = np.zeros(n, dtype=np.int64)
        self.decisions = np.zeros((n, len(core.nvec)), dtype=np.int64)
        self.paid = np.zeros(n)
        self._seen: Seen | None = None  # of all, where all are at the same stage
        self._known = np.zeros(n, dtype=np.bool_)
        self._observed = np.zeros((n, *core.observation_space.shape), np.float32) if core.is_staged else None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen": None}  # it is computed again

    @property
    def over(self) -> Array:
        """Which are over, bool ``[n]``."""
        return self.stage == len(self.core.stages)

    def begin(self, envs: Array) -> None:
        """Begin some anew, on other instances."""
        self.stage[envs], self.decisions[envs], self.paid[envs], self._known[envs] = 0, 0, 0, False
        self._seen = None

    def decide(self, envs: Array, choices: Array) -> None:
        """Decide, in some, the stage that each is at.

        Args:
            envs: Which, int64.
            choices: As ``core.actions.decisions`` gives them, int64 ``[n, components]``, a row for each of all
                episodes; the components that a stage does not have are passed over.
        """
        for number in np.unique(self.stage[envs]):
            at = envs[self.stage[envs] == number]
            decided = self.decisions[at]
            self.core.take(int(number), decided, self.core.spread(self.stage[at], choices[at]))
            self.decisions[at] = decided
        self.stage[envs] += 1
        self._known[envs] = self.over[envs]  # what was decided on last is still to be seen

    def outcome(self, split: Split, rows: Array, envs: Array) -> Outcome:
        """What came of some, which are over; the pass goes on from the last look, if all have ended together."""
        together = len(envs) == len(self.stage)
        return self.core.score(split, rows[envs], self.decisions[envs], self._seen if together else None)

    def savings(self, split: Split, rows: Array, envs: Array) -> Array:
        """Pay some for what they have saved since they were paid last: float64, a number for each."""
        saved = 1 - split.costs.flops_ratio(rows[envs], self.decisions[envs])
        reward = saved - self.paid[envs]
        self.paid[envs] = saved
        return reward

    def observe(self, split: Split, rows: Array) -> Observations:
        """What is seen of each, in new arrays; of those that are over, what was decided on last."""
        if not self.core.is_staged:
            return self.core.observe(split, rows)
        with torch.inference_mode():
            stage = np.minimum(self.stage, len(self.core.stages) - 1)
            for number in np.unique(stage[~self._known]):
                at = np.flatnonzero(~self._known & (stage == number))
                together = len(at) == len(rows)
                self._observed[at], seen = self.core.stage_observation.observe(
                    split, rows[at], int(number), self.decisions[at], self._seen_before(number) if together else None
                )
                self._seen = seen if together else None
        self._known[:] = True
        return self._observed.copy()

    def masks(self) -> Array:
        """Which choices of each component each may make, bool ``[n, choices]``, as sb3-contrib has them."""
        nvec = self.core.actions.nvec
        masks = np.ones((len(self.stage), nvec.sum()), dtype=np.bool_)
        if not self.core.is_staged:
            return masks
        for env, number in enumerate(np.minimum(self.stage, len(self.core.stages) - 1)):
            columns = self.core.columns[number]
            masks[env, 2 * (columns.stop - columns.start) + 1 : 2 * self.core.widest : 2] = False
            if self.core.stages[number] != "first":
                masks[env, 2 * self.core.widest + 1 :] = False
        return masks

    def state(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {"stage": self.stage.tolist(), "decisions": self.decisions.tolist(), "paid": self.paid.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.stage, self.decisions = np.array(state["stage"]), np.array(state["decisions"])
        self.paid, self._seen = np.array(state["paid"]), None
        self._known[:] = False

    def _seen_before(self, number: int) -> Seen | None:
        """What all have shown at the stage before, if that is what is known."""
        before = self.core.stages[number - 1] if number else None
        return self._seen if self._seen is not None and self._seen.stage == before else None
