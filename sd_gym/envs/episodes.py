"""Episodes of one or more steps: how far each of a batch has come, what it sees there, and what it has decided."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import create_empty_array
from numpy.typing import NDArray

from sd_gym.envs.outcome import Outcome
from sd_gym.envs.spaces import Observations, put

if TYPE_CHECKING:  # an env of a table needs no torch
    from sd_gym.envs.protocols import Split
    from sd_gym.switch import PassState

Array = NDArray


class Steps:
    """Which components of a decision each step of an episode makes, and where in an action they stand.

    All steps have the same action space, that of the largest. Where a step has fewer components the rest is passed
    over, and of fewer choices the last one is taken; both are masked.

    Args:
        components: For each stage, those that it decides, int64.
        places: For each stage, where in an action they stand, int64.
        nvec: Sizes of a decision's components.

    Attributes:
        components: As given.
        choices: Sizes of an action's components, int64.
        masks: Which of their choices each stage has, bool ``[stages, sum(choices)]``.
    """

    def __init__(self, components: Sequence[Array], places: Sequence[Array], nvec: Array) -> None:
        self.components, self._places, self._nvec = list(components), list(places), nvec
        sizes = np.ones((len(self.components), 1 + max(int(place.max(initial=0)) for place in places)), dtype=np.int64)
        for size, component, place in zip(sizes, components, places, strict=True):
            size[place] = nvec[component]
        self.choices = sizes.max(axis=0)
        has = [[np.arange(most) < own for most, own in zip(self.choices, size, strict=True)] for size in sizes]
        self.masks = np.stack([np.concatenate(one) for one in has])

    def take(self, stage: int, decisions: Array, choices: Array) -> None:
        """Write what a stage decides, of ``choices``, into ``decisions``; both ``[n, components of a decision]``."""
        components = self.components[stage]
        decisions[:, components] = choices[:, components]

    def spread(self, stage: Array, choices: Array) -> Array:
        """What actions say, at the components that their stages decide.

        Args:
            stage: Number of the stage of each row, int64 ``[n]``.
            choices: As ``actions.decisions`` gives them, ``[n, components of an action]``.

        Returns:
            int64 ``[n, components of a decision]``, zeros elsewhere.
        """
        spread = np.zeros((len(choices), len(self._nvec)), dtype=np.int64)
        for number in np.unique(stage):
            at = np.flatnonzero(stage == number)[:, None]
            components = self.components[number]
            spread[at, components] = np.minimum(choices[at, self._places[number]], self._nvec[components] - 1)
        return spread

    def ends(self, stage: int) -> Array:
        """A decision, int64 ``[components]``, that skips as much as can be behind a stage, and nothing before."""
        behind = np.zeros(len(self._nvec), dtype=np.int64)
        for components in self.components[stage + 1 :]:
            behind[components] = self._nvec[components] - 1
        return behind

    def of_logits(self) -> tuple[Array, int]:
        """Where in a decision's logits an action's choices stand at each stage.

        Returns:
            int64 ``[stages, sum(choices)]``, and how many logits a decision has, ``N``: ``N`` stands for a choice that
            is certain, since the stage has not this component, and ``N + 1`` for one that is never made.
        """
        ends = np.cumsum(self._nvec)
        certain, never = int(ends[-1]), int(ends[-1]) + 1
        own = np.split(np.arange(certain), ends[:-1])
        found = []
        for components, places in zip(self.components, self._places, strict=True):
            rows = [np.array([certain] + [never] * (size - 1)) for size in self.choices.tolist()]
            for component, place in zip(components, places, strict=True):
                rows[place] = np.append(own[component], np.full(self.choices[place] - self._nvec[component], never))
            found.append(np.concatenate(rows))
        return np.array(found, dtype=np.int64), certain


class StageLooks(Protocol):
    """What is seen at the stages of an episode, of a backbone or of a table."""

    space: gym.Space

    def observe(
        self, split: Split, rows: Array, stage: int, decisions: Array, resume_from: PassState | None
    ) -> tuple[Observations, PassState | None]:
        """As ``StageObservation.observe``."""

    def judging_flops(self, split: Split, rows: Array) -> Array:
        """As ``StageObservation.judging_flops``."""


class FirstLook:
    """What is seen at the only stage of an episode: the core's observation, before the first layer.

    Args:
        core: The core.
    """

    def __init__(self, core: EpisodicCore) -> None:
        self._core, self.space = core, core.observation.space

    def observe(
        self, split: Split, rows: Array, stage: int, decisions: Array, behind: PassState | None
    ) -> tuple[Observations, None]:
        """As ``StageObservation.observe``: nothing is run."""
        return self._core.observe(split, rows), None

    def judging_flops(self, split: Split, rows: Array) -> Array:
        """Zeros, int64 ``[n]``: the head judges nothing."""
        return np.zeros(len(rows), dtype=np.int64)


class EpisodicCore:
    """What a core makes of episodes, be it of a backbone or of a table.

    Attributes:
        stages: Names of the stages of an episode, in execution order.
        steps: Which components of a decision each stage makes.
        nvec: Sizes of these components.
        observation: What is seen before the first layer.
        stage_observation: What is seen at the stages.
    """

    stages: list[str]
    steps: Steps
    nvec: Array
    observation: Any
    stage_observation: StageLooks

    @property
    def is_staged(self) -> bool:
        """Whether anything is decided elsewhere than before the first layer."""
        return self.stages != ["first"]

    def episodes(self, n: int) -> Episodes:
        """A batch of ``n`` episodes."""
        return Episodes(self, n)

    def walk(
        self, split: Split, rows: Array, decide: Callable[[Observations], Array]
    ) -> tuple[Array, PassState | None]:
        """Decide on rows, from stage to stage, each on what the decisions before it have led to.

        Args:
            split: Where the instances are.
            rows: Their rows, int64 ``[n]``.
            decide: Called once a stage. From observations to decisions ``[n, components]``, of which those of the
                stage count.

        Returns:
            The decisions, int64 ``[n, components]``, and what the pass has shown at the last stage, for ``score`` to
            go on from; ``None`` where that is before the first layer, or nothing runs.
        """
        decisions, seen = np.zeros((len(rows), len(self.nvec)), dtype=np.int64), None
        for stage in range(len(self.stages)):
            observations, seen = self.stage_observation.observe(split, rows, stage, decisions, seen)
            self.steps.take(stage, decisions, decide(observations))
        return decisions, seen


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

    def __init__(self, core: EpisodicCore, n: int) -> None:
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
