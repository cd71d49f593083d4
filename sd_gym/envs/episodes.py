"""Episodes of one or more steps: how far each of a batch has come, what it sees, decides, earns and tells."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import create_empty_array
from numpy.typing import NDArray

from sd_gym.envs.protocols import Core, Observations, Outcome, Split
from sd_gym.envs.spaces import put
from sd_gym.objectives import Objective

if TYPE_CHECKING:  # an env of a table needs no torch
    from sd_gym.execution.split import BackboneSplit
    from sd_gym.switch import PassState

Array = NDArray


class Episodes:
    """A batch of episodes, each of one instance: a step is a stage, which decides the switches up to the next one.

    ``rows`` says which instance of the split each has, ``stage`` at which stage it is (after the last one it is over),
    int64 ``[n]``; what is not decided yet is 0 in ``decisions``: it runs; ``paid`` was given for savings.
    """

    def __init__(self, core: Core, n: int, info_text: bool = False) -> None:
        self.core, self.info_text, self.objective = core, info_text, Objective(core.config.reward)
        self._split: Split | None = None
        self.rows, self.stage = np.zeros((2, n), dtype=np.int64)
        self.decisions = np.zeros((n, len(core.nvec)), dtype=np.int64)
        self.paid = np.zeros(n)

    @property
    def is_begun(self) -> bool:
        """Whether there was a first reset."""
        return self._split is not None

    @property
    def split(self) -> Split:
        """Where the instances are; raises ``gymnasium.error.ResetNeeded`` before the first reset."""
        if self._split is None:
            raise gym.error.ResetNeeded("call reset() before the first step()")
        return self._split

    @split.setter
    def split(self, split: Split) -> None:
        self._split = split

    @property
    def texts(self) -> BackboneSplit:
        """The split, which has texts."""
        return cast("BackboneSplit", self.split)  # where texts are asked for, check_shown has refused those of tables

    @property
    def over(self) -> Array:
        """Which are over, bool ``[n]``."""
        return self.stage == len(self.core.stages)

    def begin(self, envs: Array, rows: Array) -> None:
        """Begin some anew, on these instances."""
        self.rows[envs] = rows
        self.stage[envs], self.decisions[envs], self.paid[envs] = 0, 0, 0

    def decide(self, envs: Array, choices: Array) -> None:
        """Decide, in some, the stage that each is at.

        Of ``choices int64 [all episodes, components]`` those that a stage does not have are passed over.
        """
        decided = self.core.steps.spread(self.stage[envs], choices[envs])
        self.decisions[envs] += decided  # what a stage decides is 0 before it
        self.stage[envs] += 1

    def results(self, envs: Array) -> tuple[dict[str, Array], Array]:
        """The step infos and the rewards of some that have just decided: all of them are over, or none is.

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
        outcome = self.core.score(self.split, self.rows[envs], decisions, self._last_look(envs))
        if reward.vector:
            rewards = np.stack([outcome.quality, -outcome.flops_ratio], axis=1).astype(np.float32)
        else:
            rewards = self.objective.rewards(outcome.quality, outcome.quality_ref, outcome.flops_ratio)
        return self.infos(envs, outcome), rewards - self.paid[envs] if reward.dense else rewards

    def no_rewards(self, n: int) -> Array:
        """Zeros in the shape of ``n`` rewards."""
        return np.zeros((n, 2), dtype=np.float32) if self.core.config.reward.vector else np.zeros(n)

    def infos(self, envs: Array, outcome: Outcome | None = None) -> dict[str, Array]:
        """The documented infos of some, one array of ``n`` values a key: see ``SwitchableEnv``.

        Without the outcome of those that are over, what only it tells is zeros.
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
        return infos | self._text_infos(rows) if self.info_text else infos

    def _text_infos(self, rows: Array) -> dict[str, Array]:
        """The texts of instances."""
        split = self.texts
        instances = [split.instances[row] for row in rows]
        texts: dict[str, list[str | None]] = {
            "source": [instance.source for instance in instances],
            "reference": [split.reference(row) for row in rows],
        }
        if split.paired:
            texts["source_pair"] = [instance.source_pair for instance in instances]
        return {key: objects(values) for key, values in texts.items()}

    def observe(self) -> Observations:
        """What is seen of each, in new arrays; of those that are over, what was decided on last."""
        return self.core.observe(self.split, self.rows)

    def masks(self) -> Array:
        """Which choices of each component each may make, bool ``[n, choices]``, as sb3-contrib has them."""
        return self.core.action_masks[np.minimum(self.stage, len(self.core.stages) - 1)]

    def state(self) -> dict[str, Any]:
        """How far all have come, as plain values."""
        return {"stage": self.stage.tolist(), "decisions": self.decisions.tolist(), "paid": self.paid.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.stage, self.decisions = np.array(state["stage"]), np.array(state["decisions"])
        self.paid = np.array(state["paid"])

    def _last_look(self, envs: Array) -> PassState | None:
        """What a pass of these has seen, from which it goes on; ``None``: nothing has run."""
        return None


class StagedEpisodes(Episodes):
    """Episodes that look in the middle of the pass: what they have seen is remembered, as it took a part of it."""

    def __init__(self, core: Core, n: int, info_text: bool = False) -> None:
        super().__init__(core, n, info_text)
        self._seen: PassState | None = None  # of all, where all are at the same stage
        self._known = np.zeros(n, dtype=np.bool_)
        self._observed: Any = create_empty_array(core.observation_space, n)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen": None}  # it is computed again

    def begin(self, envs: Array, rows: Array) -> None:
        """Begin some anew, on these instances."""
        super().begin(envs, rows)
        self._known[envs], self._seen = False, None

    def decide(self, envs: Array, choices: Array) -> None:
        """Decide, in some, the stage that each is at; see ``Episodes.decide``."""
        super().decide(envs, choices)
        self._known[envs] = self.over[envs]  # what was decided on last is still to be seen

    def infos(self, envs: Array, outcome: Outcome | None = None) -> dict[str, Array]:
        """With the ``action_mask`` of each, and with an answer stage ``goes_on``; see ``Episodes.infos``."""
        infos = super().infos(envs, outcome) | {"action_mask": self.masks()[envs].astype(np.int8)}
        if self.core.has_answer_stage:
            infos["goes_on"] = self.decisions[envs, -1] == 1
        return infos

    def observe(self) -> Observations:
        """What is seen of each at its stage, in new arrays; of those that are over, what was decided on last."""
        stage = np.minimum(self.stage, len(self.core.stages) - 1)
        for number in np.unique(stage[~self._known]):
            at = np.flatnonzero(~self._known & (stage == number))
            together = len(at) == len(self.rows)
            observed, seen = self.core.stage_observation.observe(
                self.split,
                self.rows[at],
                int(number),
                self.decisions[at],
                self._seen_before(number) if together else None,
            )
            put(self._observed, at, observed)
            self._seen = seen if together else None
        self._known[:] = True
        return copy.deepcopy(self._observed)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        super().load_state(state)
        self._known[:], self._seen = False, None

    def _last_look(self, envs: Array) -> PassState | None:
        return self._seen if len(envs) == len(self.stage) else None

    def _seen_before(self, number: int) -> PassState | None:
        """What all have shown at the stage before, if that is what is known."""
        before = self.core.stages[number - 1] if number else None
        return self._seen if self._seen is not None and self._seen.stage == before else None


def objects(values: list[Any]) -> NDArray:
    """An array whose elements are these."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
