"""What an env needs: a core and its splits. A backbone and a table are the two implementations; torch is not needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.config import EnvConfig
from sd_gym.envs.actions import Actions, StageActions, decisions_as_actions
from sd_gym.going_on import ANSWER, masks_and_goes_on

if TYPE_CHECKING:  # it needs torch
    from sd_gym.envs.export import Export
    from sd_gym.switch import PassState

Observations = Array | dict[str, Array]  # of a batch: one row per instance
SCORES = ("quality", "quality_ref", "flops_ratio")  # the fields of an ``Outcome``


@dataclass(frozen=True)
class Outcome:
    """The outcomes of decisions; every field is float64 ``[n]``, one row per instance."""

    quality: Array  # task quality under the decision
    quality_ref: Array  # task quality of the dense backbone
    flops_ratio: Array  # FLOPs under the decision over dense FLOPs

    @property
    def cost(self) -> Array:
        """Lost quality, float64 ``[n]``; negative where quality is gained. Its mean may be epsilon."""
        return self.quality_ref - self.quality


class Scores(Protocol):
    """Quality of rows ``[n]`` of a split under decisions ``[n, components]``; float64 ``[n]`` each."""

    @property
    def highest(self) -> float:
        """The highest quality that an instance can have or lose: 1, but more if a class counts more."""
        ...

    def quality(self, rows: Array, decisions: Array, resume_from: Any = None) -> tuple[Array, Array]:
        """Quality under the decisions, and dense quality; the pass resumes from the state ``resume_from``, if given."""
        ...

    def run(self, rows: Array, decisions: Array) -> Array:
        """Quality under the decisions; nothing is cached."""
        ...

    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality, and the likelihood of the reference (0 in a table, which has no likelihoods)."""
        ...

    def under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]:
        """``quality_and_likelihood`` under each of several masks ``[masks, components]``, each ``[n, masks]``."""
        ...

    def score_dense(self, on_batch: Callable[[], None] = ...) -> None:
        """Compute the dense quality of all rows; ``on_batch`` is called after each batch."""
        ...

    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]:
        """The metrics of a report, by name."""
        ...


class Costs(Protocol):
    """FLOPs of rows ``[n]`` of a split under decisions ``[n, components]``, int64 ``[n]``, with those of going on."""

    def flops_ratio(self, rows: Array, decisions: Array) -> Array:
        """FLOPs over dense FLOPs, float64."""
        ...

    def flops(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions."""
        ...

    def dense_flops(self, rows: Array) -> Array:
        """FLOPs of the dense backbone."""
        ...

    def head_flops(self, rows: Array) -> Array:
        """FLOPs of the head, which no decision skips."""
        ...

    def going_on(self, rows: Array, masks: Array) -> Array:
        """FLOPs of going on after masks: what the answer stage adds."""
        ...


class Split(Protocol):
    """One split of a data set; ``BackboneSplit`` also has its texts, tensors and passes."""

    name: str  # train, validation or test

    @property
    def ids(self) -> Array:
        """Ids of the instances, strings ``[n]`` of dtype object."""
        ...

    @property
    def row_of(self) -> dict[str, int]:
        """Row of each instance, by its id."""
        ...

    @property
    def difficulty(self) -> Array:
        """Level of each instance, int64 ``[n]``; 0 if unknown."""
        ...

    @property
    def levels(self) -> Array:
        """Difficulty for reports, int64 ``[n]``."""
        ...

    @property
    def encoded(self) -> Any:
        """The tokenised instances: ``source_length``, int64 ``[n]``; ``source_cut``, ``target_cut``, bool ``[n]``."""
        ...

    @property
    def scoring(self) -> Scores:
        """Quality under decisions."""
        ...

    @property
    def costs(self) -> Costs:
        """FLOPs under decisions."""
        ...

    @property
    def provenance(self) -> dict[str, Any]:
        """Which rows these are."""
        ...

    def __len__(self) -> int: ...

    def facts(self) -> dict[str, Array]:
        """Facts of each instance that are known before any decision, by name, each ``[n]``."""
        ...


def mean_flops(split: Split, rows: Array, decisions: Iterable[Array]) -> Array:
    """Mean FLOPs ratio of ``rows [n]`` under each of several decisions ``[components]``, float64 ``[decisions]``."""
    tiled = (np.tile(decision, (len(rows), 1)) for decision in decisions)
    return np.array([split.costs.flops_ratio(rows, under).mean() for under in tiled])


OfSplit = TypeVar("OfSplit", contravariant=True)
S = TypeVar("S")  # the kind of split that a core makes and takes


class StageObserver(Protocol[OfSplit]):
    """The observations at the stages of an episode."""

    space: gym.Space  # of one observation
    judges: bool  # whether the head judges the hidden states at each stage in the middle of a pass
    judgements: int  # how often it does so in one episode
    answer_size: int  # values of the head's judgement of its answer, which end an observation; 0: no answer stage

    def observe(
        self, split: OfSplit, rows: Array, stage: int, decisions: Array, resume_from: PassState | None
    ) -> tuple[Observations, PassState | None]:
        """The observations at a stage, and the state of the pass there.

        Args:
            split: The split of the instances.
            rows: Which of its instances, ``[n]``.
            stage: Index of the stage.
            decisions: ``[n, components]``; components of this and later stages are ignored.
            resume_from: State of the pass of the same rows at the stage before, if known.

        Returns:
            The observations, and the state from which the next stage resumes: ``None`` before the first layer, or where
            no backbone runs.
        """
        ...


class Core(ABC, Generic[S]):
    """Draws instances, observes them, and scores decisions on them; shared by all envs of the same configuration."""

    config: EnvConfig
    nvec: Array  # sizes of a decision's components, int64 [components]
    mask_nvec: Array  # sizes of a mask's components, int64 [switches + 1]
    stages: list[str]  # stages of an episode, in execution order
    stage_actions: StageActions  # which components of a decision each stage makes
    actions: Actions  # from actions to decisions
    observation: Any  # of the first stage; has a space, and the FLOPs of computing it
    backbone: Any  # with name, weights and board; the backbone of a table cannot run
    data: Any  # which rows each split has
    switch_names: list[str]  # what each component of a decision but the last one skips
    highest_flops_ratio: float  # an upper bound of the FLOPs ratio

    @cached_property  # type checkers refuse an abstract one
    def stage_observer(self) -> StageObserver[S]:
        """The observations at the stages; made when first used."""
        raise NotImplementedError(f"{type(self).__name__} has no stage_observer")

    @abstractmethod
    def split(self, name: str) -> S:
        """A split by name; raises ``ValueError`` for an unknown name."""

    @abstractmethod
    def to_masks(self, decisions: Array) -> Array:
        """Decisions ``[n, components]`` as masks, int64 ``[n, switches + 1]``."""

    @abstractmethod
    def from_masks(self, masks: Array) -> Array:
        """Masks ``[n, switches + 1]`` as decisions, int64 ``[n, components]``; ``ValueError`` for an unknown mask."""

    @abstractmethod
    def export(self) -> Export | None:
        """What a policy needs to decide without this env; ``None`` if it needs the env."""

    @property
    def observation_space(self) -> gym.Space:
        """The space of one observation."""
        return self.stage_observer.space

    def observing_flops(self, split: Any, rows: Array, *, blind: bool) -> Array:
        """FLOPs of all observations in one episode of each row, int64 ``[n]``; judgements count even if blind."""
        judging = self.stage_observer.judgements * split.costs.head_flops(rows)
        return judging if blind else judging + self.observation.flops

    @property
    def can_exit(self) -> bool:
        """Whether the backbone can run, and its head can judge the output of any layer."""
        return False

    @cached_property
    def action_masks(self) -> Array:
        """Which choices of an action each stage has, bool ``[stages, choices]``."""
        if self.actions.are_decisions:
            return self.stage_actions.masks
        return np.ones((1, self.actions.nvec.sum()), dtype=np.bool_)  # bits and codebooks have one stage

    @cached_property
    def _decision_space(self) -> Actions:
        return decisions_as_actions(self.nvec)

    @property
    def n_switches(self) -> int:
        """Number of switches of the backbone."""
        return len(self.mask_nvec) - 1

    @property
    def has_answer_stage(self) -> bool:
        """Whether the last component of a decision is to go on (1) or to accept the answer (0)."""
        return self.stages[-1] == ANSWER

    @property
    def n_skips(self) -> int:
        """Number of components of a decision that skip something: all except going on."""
        return len(self.nvec) - self.has_answer_stage

    def goes_on(self, decisions: Array) -> Array:
        """Which rows of decisions ``[n, components]`` go on, bool ``[n]``; see ``masks_and_goes_on``."""
        return masks_and_goes_on(decisions, self.n_skips)[1]

    def joined(self, masks: Array, goes_on: Array) -> Array:
        """Masks ``[n, switches + 1]``; with the answer stage, one more column: whether each row goes on."""
        return np.column_stack([masks, goes_on]) if self.has_answer_stage else masks

    @property
    def is_staged(self) -> bool:
        """Whether anything is decided after the first layer's input."""
        return self.stages != ["first"]

    def scores(self) -> dict[str, dict[str, Any]]:
        """The cached scores of each split, by its name; a table has none."""
        return {}

    def load_scores(self, scores: dict[str, dict[str, Any]]) -> None:
        """Replace the cached scores."""

    def observe(self, split: S, rows: Array) -> Observations:
        """Observations of rows ``[n]`` of a split before the first layer: new arrays."""
        return self.observation.observe(split, rows)

    def rollout(self, split: S, rows: Array, decide: Callable[[Observations], Array]) -> tuple[Array, PassState | None]:
        """Decide on rows ``[n]`` stage by stage; each observation follows from the decisions so far.

        ``decide`` is called once per stage: from observations to decisions ``[n, components]``, of which those of the
        stage count. Returns the decisions, int64 ``[n, components]``, and the state of the pass at the last stage, from
        which ``score`` goes on; ``None`` where that is before the first layer, or no backbone runs.
        """
        decisions, state = np.zeros((len(rows), len(self.nvec)), dtype=np.int64), None
        for stage, components in enumerate(self.stage_actions.components):
            observations, state = self.stage_observer.observe(split, rows, stage, decisions, state)
            decisions[:, components] = decide(observations)[:, components]
        return decisions, state

    def score(self, split: Any, rows: Array, decisions: Any, resume_from: PassState | None = None) -> Outcome:
        """The outcomes of one decision per row, ``[n, components]``, by one batched run of the backbone if it can run.

        It goes on from ``resume_from``, the state of the pass of these rows under these decisions, if given.

        Raises:
            ValueError: If a decision is malformed.
        """
        decisions = self._decision_space.decisions(decisions, len(rows))
        quality, quality_ref = split.scoring.quality(rows, decisions, resume_from)
        return Outcome(quality, quality_ref, split.costs.flops_ratio(rows, decisions))
