"""Episodes of one or more steps: how far each of a batch has come, what it sees there, and what it has decided."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector.utils import create_empty_array
from numpy.typing import NDArray

from sd_gym.envs.protocols import Core, Observations, Outcome, Split
from sd_gym.envs.spaces import put

if TYPE_CHECKING:  # an env of a table needs no torch
    from sd_gym.switch import PassState

Array = NDArray


class FirstLook:
    """The ``StageLooks`` of a core with one stage: its observation, before the first layer."""

    judges = False

    def __init__(self, core: Core) -> None:
        self._core, self.space = core, core.observation.space

    def observe(
        self, split: Split, rows: Array, stage: int, decisions: Array, resume_from: PassState | None
    ) -> tuple[Observations, None]:
        """Nothing is run; see ``StageLooks.observe``."""
        return self._core.observe(split, rows), None

    def judging_flops(self, split: Split, rows: Array) -> Array:
        """Zeros, int64 ``[n]``: the head judges nothing."""
        return np.zeros(len(rows), dtype=np.int64)


class Episodes:
    """A batch of episodes, each of one instance: a step is a stage, which decides the switches up to the next one.

    Args:
        core: The core.
        n: How many there are.

    Attributes:
        stage: At which stage each is, int64 ``[n]``; behind the last one it is over.
        decisions: What is decided so far, int64 ``[n, components]``; what is not is 0: it runs.
        paid: Reward that each was given for savings, float64 ``[n]``.
    """

    def __init__(self, core: Core, n: int) -> None:
        self.core = core
        self.stage = np.zeros(n, dtype=np.int64)
        self.decisions = np.zeros((n, len(core.nvec)), dtype=np.int64)
        self.paid = np.zeros(n)
        self._seen: PassState | None = None  # of all, where all are at the same stage
        self._known = np.zeros(n, dtype=np.bool_)
        self._observed = create_empty_array(core.observation_space, n) if core.is_staged else None

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
        said = self.core.steps.spread(self.stage[envs], choices[envs])
        self.decisions[envs] += said  # what a stage decides is 0 before it
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
        stage = np.minimum(self.stage, len(self.core.stages) - 1)
        for number in np.unique(stage[~self._known]):
            at = np.flatnonzero(~self._known & (stage == number))
            together = len(at) == len(rows)
            observed, seen = self.core.stage_observation.observe(
                split, rows[at], int(number), self.decisions[at], self._seen_before(number) if together else None
            )
            put(self._observed, at, observed)
            self._seen = seen if together else None
        self._known[:] = True
        return copy.deepcopy(self._observed)

    def masks(self) -> Array:
        """Which choices of each component each may make, bool ``[n, choices]``, as sb3-contrib has them."""
        if not self.core.is_staged:
            return np.ones((len(self.stage), self.core.actions.nvec.sum()), dtype=np.bool_)
        return self.core.steps.masks[np.minimum(self.stage, len(self.core.stages) - 1)]

    def state(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {"stage": self.stage.tolist(), "decisions": self.decisions.tolist(), "paid": self.paid.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.stage, self.decisions = np.array(state["stage"]), np.array(state["decisions"])
        self.paid, self._seen = np.array(state["paid"]), None
        self._known[:] = False

    def _seen_before(self, number: int) -> PassState | None:
        """What all have shown at the stage before, if that is what is known."""
        before = self.core.stages[number - 1] if number else None
        return self._seen if self._seen is not None and self._seen.stage == before else None
