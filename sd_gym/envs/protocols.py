"""What an env needs: a core and its splits. A backbone and a table are the two implementations; torch is not needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.config import EnvConfig
from sd_gym.envs.actions import Actions, Steps
from sd_gym.going_on import ANSWER, parted

if TYPE_CHECKING:  # it needs torch
    from sd_gym.envs.export import Export
    from sd_gym.switch import PassState

Array = NDArray
Observations = Array | dict[str, Array]  # of a batch: one row an instance


@dataclass(frozen=True)
class Outcome:
    """What decisions lead to; every field is float64 ``[n]``, one row an instance."""

    quality: NDArray  # task quality under the decision
    quality_ref: NDArray  # task quality of the dense backbone
    flops_ratio: NDArray  # FLOPs under the decision over dense FLOPs

    @property
    def cost(self) -> NDArray:
        """The quality that is lost, float64 ``[n]``; below 0 where it is gained. Its mean may be epsilon."""
        return self.quality_ref - self.quality


class Scores(Protocol):
    """What answers are worth, of rows ``[n]`` of a split under decisions ``[n, components]``; float64 ``[n]`` each."""

    # Quality under the decisions, and dense quality.
    def quality(self, rows: Array, decisions: Array) -> tuple[Array, Array]: ...
    # Quality under the decisions; nothing is remembered.
    def run(self, rows: Array, decisions: Array) -> Array: ...
    # Quality, and the likelihood of the reference; of a table, which has none, 0.
    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]: ...
    # The same under each of some decisions, each float64 [n, masks].
    def under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]: ...
    # Know the dense quality of all rows.
    def score_dense(self, on_batch: Callable[[], None] = ...) -> None: ...
    # The metric of a report, by name.
    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]: ...


class Costs(Protocol):
    """FLOPs of rows ``[n]`` of a split under decisions ``[n, components]``, int64 ``[n]``; those of going on count."""

    # Over dense FLOPs, float64.
    def flops_ratio(self, rows: Array, decisions: Array) -> Array: ...
    def flops(self, rows: Array, decisions: Array) -> Array: ...
    def dense_flops(self, rows: Array) -> Array: ...
    # Of the head, which no decision saves.
    def head_flops(self, rows: Array) -> Array: ...
    # Of going on after decisions: what the answer stage adds.
    def going_on(self, rows: Array, masks: Array) -> Array: ...


class Lengths(Protocol):
    """How long the inputs of a split are, int64 ``[n]``, and which inputs and targets were cut, bool ``[n]``."""

    @property
    def source_length(self) -> Array: ...
    @property
    def source_cut(self) -> Array: ...
    @property
    def target_cut(self) -> Array: ...


class Split(Protocol):
    """One split of a data set; ``BackboneSplit`` also has its texts, tensors and passes."""

    name: str  # train, validation or test

    @property
    def instances(self) -> Sequence[Any]: ...  # each with its id, in order
    @property
    def ids(self) -> Array: ...  # strings [n] of dtype object
    @property
    def number_of(self) -> dict[str, int]: ...  # row of each instance, by its id
    @property
    def difficulty(self) -> Array: ...  # int64 [n]; 0 where it is not known
    @property
    def levels(self) -> Array: ...  # difficulty for reports, int64 [n]
    @property
    def encoded(self) -> Lengths: ...
    @property
    def scoring(self) -> Scores: ...
    @property
    def costs(self) -> Costs: ...
    @property
    def provenance(self) -> dict[str, Any]: ...  # which rows these are
    def __len__(self) -> int: ...
    # What is known of each instance before any decision, by name, each [n].
    def facts(self) -> dict[str, Array]: ...


OfSplit = TypeVar("OfSplit", contravariant=True)
S = TypeVar("S")  # the splits of a core, which it takes back: each has what ``Split`` has


class StageLooks(Protocol[OfSplit]):
    """What is seen at the stages of an episode."""

    space: gym.Space  # of one observation
    judges: bool  # whether the head judges, at each stage in the middle of a pass, what a layer gives

    # What is seen of rows [n] that have come to a stage under decisions [n, components]; what these say from the stage
    # on does not count. resume_from is what the same rows have shown at the stage before, if it is known. Gives
    # observations, and what to go on from: None before the first layer, or where nothing runs.
    def observe(
        self, split: OfSplit, rows: Array, stage: int, decisions: Array, resume_from: PassState | None
    ) -> tuple[Observations, PassState | None]: ...
    # A batch of n episodes of a core with these looks, before the first reset.
    def episodes(self, core: Core, n: int, info_text: bool) -> Any: ...
    # FLOPs of the head's judgements in one episode of each row, int64 [n]; that of the answer costs nothing.
    def judging_flops(self, split: OfSplit, rows: Array) -> Array: ...


class Core(Protocol[S]):
    """Draws instances, observes them, and scores decisions on them; shared by all envs of the same configuration."""

    config: EnvConfig
    nvec: Array  # sizes of a decision's components, int64 [components]
    decision_nvec: Array  # sizes of a mask's components, int64 [switches + 1]
    stages: list[str]  # of an episode, in execution order
    steps: Steps  # which components of a decision each stage makes
    actions: Actions  # how an agent says its decisions
    observation: Any  # what is seen before the first layer; it has a space, and the FLOPs of making it
    backbone: Any  # with name, weights and board; of a table it is not there to run
    data: Any  # which rows each split has
    switch_names: list[str]  # what each component of a decision but the last one skips
    highest_flops_ratio: float  # a bound on the FLOPs ratio of any decision

    @property
    def observation_space(self) -> gym.Space:
        """Of one observation."""
        return self.stage_observation.space

    def observing_flops(self, split: S, rows: Array, *, blind: bool) -> Array:
        """FLOPs of all looks of one episode of each row, int64 ``[n]``; the judgements count for a blind policy too."""
        judging = self.stage_observation.judging_flops(split, rows)
        return judging if blind else judging + self.observation.flops

    @property
    def sees_confidence(self) -> bool:
        """Whether the backbone is there to run, and has a probability of its answer before it gives it."""
        return False

    @property
    def can_exit(self) -> bool:
        """Whether the backbone is there to run, and its head can judge what any layer gives."""
        return False

    @cached_property
    def action_masks(self) -> Array:
        """Which choices of an action each stage has, bool ``[stages, choices]``."""
        if self.actions.are_decisions:
            return self.steps.masks
        return np.ones((1, self.actions.nvec.sum()), dtype=np.bool_)  # of bits and codebooks there is one stage

    @property
    def n_switches(self) -> int:
        """Number of switches of the backbone."""
        return len(self.decision_nvec) - 1

    @property
    def has_answer_stage(self) -> bool:
        """Whether the last component of a decision says to go on: 1, or to accept the answer: 0."""
        return self.stages[-1] == ANSWER

    @property
    def n_skips(self) -> int:
        """Number of components of a decision that skip something: all but whether to go on."""
        return len(self.nvec) - self.has_answer_stage

    def goes_on(self, decisions: Array) -> Array:
        """Which rows go on after their answer, bool ``[n]``, of decisions ``[n, components]``."""
        return parted(decisions, self.n_skips)[1]

    def joined(self, masks: Array, goes_on: Array) -> Array:
        """Masks ``[n, switches + 1]``, with the answer stage followed by whether each row goes on."""
        return np.column_stack([masks, goes_on]) if self.has_answer_stage else masks

    @property
    def is_staged(self) -> bool:
        """Whether anything is decided elsewhere than before the first layer."""
        return self.stages != ["first"]

    def observe(self, split: S, rows: Array) -> Observations:
        """What is seen of rows ``[n]`` of a split before the first layer: new arrays."""
        return self.observation.observe(split, rows)

    def rollout(self, split: S, rows: Array, decide: Callable[[Observations], Array]) -> tuple[Array, PassState | None]:
        """Decide on rows ``[n]``, from stage to stage, each on what the decisions before it have led to.

        ``decide`` is called once a stage: from observations to decisions ``[n, components]``, of which those of the
        stage count. Returns the decisions, int64 ``[n, components]``, and what the pass has shown at the last stage,
        for ``score`` to go on from; ``None`` where that is before the first layer, or nothing runs.
        """
        decisions, seen = np.zeros((len(rows), len(self.nvec)), dtype=np.int64), None
        for stage in range(len(self.stages)):
            observations, seen = self.stage_observation.observe(split, rows, stage, decisions, seen)
            self.steps.take(stage, decisions, decide(observations))
        return decisions, seen

    # What is seen at the stages; made once it is asked for.
    @cached_property
    def stage_observation(self) -> StageLooks[S]: ...
    # A split by name; raises ValueError if there is none of that name.
    def split(self, name: str) -> S: ...
    # What comes of one decision an instance, [n, components]; raises ValueError if one is malformed. With what a pass
    # of these rows under these decisions has seen at a stage it goes on from there.
    def score(self, split: S, rows: Array, decisions: Array, seen: PassState | None = None) -> Outcome: ...
    # Decisions [n, components] as masks, int64 [n, switches + 1]; and back: raises ValueError if there is no such mask.
    def to_masks(self, decisions: Array) -> Array: ...
    def from_masks(self, masks: Array) -> Array: ...
    # What a policy takes along when it leaves this env; None: it cannot.
    def export(self) -> Export | None: ...
    # What is remembered of each split, by its name; and to remember nothing else.
    def scores(self) -> dict[str, dict[str, Any]]: ...
    def load_scores(self, scores: dict[str, dict[str, Any]]) -> None: ...
