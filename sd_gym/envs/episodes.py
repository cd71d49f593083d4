"""A batch of episodes of one or more steps: stages, observations, decisions, rewards and infos."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import create_empty_array
from numpy.typing import NDArray as Array

from sd_gym.envs.protocols import Core, Observations, Outcome, Split
from sd_gym.envs.spaces import write_rows
from sd_gym.objectives import Objective

if TYPE_CHECKING:  # an env of a table needs no torch
    from sd_gym.execution.split import BackboneSplit
    from sd_gym.switch import PassState


class Episodes:
    """A batch of episodes, each of one instance: a step is a stage, which decides the switches up to the next one.

    Observations are cached: each takes a part of the pass. ``rows`` and ``stage`` are int64 ``[n]``.
    """

    def __init__(self, core: Core, n: int) -> None:
        self.core = core
        self.objective = Objective(core.config.reward)
        self._split: Split | None = None
        self.rows, self.stage = np.zeros((2, n), dtype=np.int64)  # after its last stage an episode is over
        self.decisions = np.zeros((n, len(core.nvec)), dtype=np.int64)  # 0, to run, where nothing is decided yet
        self.paid = np.zeros(n)  # rewards for savings that were given so far
        self._state: PassState | None = None  # state of the common pass, if all are at the same stage
        self._known = np.zeros(n, dtype=np.bool_)  # episodes whose observation is up to date
        self._observed: Any = create_empty_array(core.observation_space, n)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_state": None}  # it is computed again

    @property
    def is_begun(self) -> bool:
        """Whether the first reset is done."""
        return self._split is not None

    @property
    def split(self) -> Split:
        """The split of the instances; raises ``gymnasium.error.ResetNeeded`` before the first reset."""
        if self._split is None:
            raise gym.error.ResetNeeded("call reset() before the first step()")
        return self._split

    @split.setter
    def split(self, split: Split) -> None:
        self._split = split

    @property
    def backbone_split(self) -> BackboneSplit:
        """The split, which has texts: ``check_render_mode`` has refused tables."""
        return cast("BackboneSplit", self.split)

    @property
    def over(self) -> Array:
        """Which episodes are over, bool ``[n]``."""
        return self.stage == len(self.core.stages)

    def begin(self, envs: Array, rows: Array) -> None:
        """Start new episodes of some envs, on these instances."""
        self.rows[envs] = rows
        self.stage[envs] = 0
        self.decisions[envs] = 0
        self.paid[envs] = 0
        self._known[envs], self._state = False, None

    def decide(self, envs: Array, choices: Array) -> None:
        """Decide the current stage of some envs.

        ``choices`` are int64 ``[all episodes, components]``; components that a stage does not have are ignored.
        """
        self.decisions[envs] += self.core.stage_actions.to_decisions(self.stage[envs], choices[envs])  # 0 until then
        self.stage[envs] += 1
        self._known[envs] = self.over[envs]  # an ended episode keeps its last observation

    def results(self, envs: Array) -> tuple[dict[str, Array], Array]:
        """The step infos and the rewards of some envs that have just decided: all of them are over, or none.

        Rewards are float64 ``[n]``, by the objective; or float32 ``[n, 2]``: quality and minus the FLOPs ratio.
        """
        if not len(envs):
            return {}, self.no_rewards(0)
        reward, decisions = self.core.config.reward, self.decisions[envs]
        if not self.over[envs].all():
            if not reward.dense:
                return self.infos(envs), self.no_rewards(len(envs))
            saved = 1 - self.split.costs.flops_ratio(self.rows[envs], decisions)
            rewards, self.paid[envs] = saved - self.paid[envs], saved
            return self.infos(envs), rewards
        state = self._state if len(envs) == len(self.stage) else None
        outcome = self.core.score(self.split, self.rows[envs], decisions, state)
        if reward.vector:
            rewards = np.stack([outcome.quality, -outcome.flops_ratio], axis=1).astype(np.float32)
        else:
            rewards = self.objective.rewards(outcome.quality, outcome.quality_ref, outcome.flops_ratio)
        return self.infos(envs, outcome), rewards - self.paid[envs] if reward.dense else rewards

    def no_rewards(self, n: int) -> Array:
        """Zeros in the shape of ``n`` rewards."""
        return np.zeros((n, 2), dtype=np.float32) if self.core.config.reward.vector else np.zeros(n)

    def infos(self, envs: Array, outcome: Outcome | None = None) -> dict[str, Array]:
        """The infos of some envs, one array of ``n`` values per key: see ``SwitchableEnv``.

        Without the outcome, which only ended episodes have, its values are zeros.
        """
        split, rows = self.split, self.rows[envs]
        known = outcome or Outcome(*np.zeros((3, len(rows))))
        infos = {
            "quality": known.quality,
            "quality_ref": known.quality_ref,
            "cost": known.cost,
            "flops_ratio": known.flops_ratio,
            "vector_reward": np.array([known.quality, 0 - known.flops_ratio]).T.copy(),
            "is_success": (known.cost <= self.core.config.reward.epsilon) & (outcome is not None),
            "instance": split.ids[rows],
            "difficulty": split.difficulty[rows],
            "decision": self.core.to_masks(self.decisions[envs]),
        }
        if self.core.is_staged:
            infos["action_mask"] = self.masks()[envs].astype(np.int8)
        if self.core.has_answer_stage:
            infos["goes_on"] = self.decisions[envs, -1] == 1
        return infos

    def observe(self) -> Observations:
        """The observation of each, in new arrays; of an ended episode, its last one."""
        stage = np.minimum(self.stage, len(self.core.stages) - 1)
        for number in np.unique(stage[~self._known]):
            at = np.flatnonzero(~self._known & (stage == number))
            together, state = len(at) == len(self.rows), self._state
            if not together or state is None or not number or state.stage != self.core.stages[number - 1]:
                state = None  # nothing to go on from
            observed, state = self.core.stage_observer.observe(
                self.split, self.rows[at], int(number), self.decisions[at], state
            )
            write_rows(self._observed, at, observed)
            self._state = state if together else None
        self._known[:] = True
        return copy.deepcopy(self._observed)

    def masks(self) -> Array:
        """Allowed choices of each component, bool ``[n, choices]``, as in sb3-contrib."""
        return self.core.action_masks[np.minimum(self.stage, len(self.core.stages) - 1)]

    def state(self) -> dict[str, Any]:
        """The state of all episodes, as plain values."""
        return {"stage": self.stage.tolist(), "decisions": self.decisions.tolist(), "paid": self.paid.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self.stage, self.decisions, self.paid = (np.array(state[key]) for key in ("stage", "decisions", "paid"))
        self._known[:], self._state = False, None
