"""What an env needs: a core and its splits. A backbone and a table are the two implementations; torch is not needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sd_gym.envs.config import EnvConfig
    from sd_gym.envs.episodes import Episodes, StageLooks, Steps
    from sd_gym.envs.export import Export
    from sd_gym.envs.outcome import Outcome
    from sd_gym.envs.spaces import Actions, Observations
    from sd_gym.switch import PassState

Array = NDArray


class Scores(Protocol):
    """What answers are worth, of rows of a split under decisions."""

    def quality(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality under the decisions ``[n, components]`` and dense quality, each float64 ``[n]``."""

    def run(self, rows: Array, decisions: Array) -> Array:
        """Quality under the decisions, float64 ``[n]``; nothing is remembered."""

    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality, and the likelihood of the reference, each float64 ``[n]``."""

    def under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]:
        """The same under each of some decisions, each float64 ``[n, masks]``."""

    def score_dense(self, on_batch: Callable[[], None] = ...) -> None:
        """Know the dense quality of all rows."""

    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]:
        """The metric of a report, by name."""


class Costs(Protocol):
    """FLOPs of rows of a split under decisions."""

    def flops_ratio(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under ``decisions [n, components]`` over dense FLOPs, float64 ``[n]``."""

    def flops(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under ``decisions``, int64 ``[n]``."""

    def dense_flops(self, rows: Array) -> Array:
        """FLOPs of the dense backbone, int64 ``[n]``."""

    def head_flops(self, rows: Array) -> Array:
        """FLOPs of the head, which no decision saves, int64 ``[n]``."""


class Split(Protocol):
    """One split of a data set.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        instances: The instances, each with its ``id``, in order.
        ids: The id of each, strings ``[n]`` of dtype object.
        number_of: Row of each, by its id.
        difficulty: Of each, int64 ``[n]``; 0 where it is not known.
        levels: Difficulty for reports, int64 ``[n]``.
        scoring: What answers are worth.
        costs: What decisions cost.
    """

    name: str
    instances: Sequence[Any]
    ids: Array
    number_of: dict[str, int]
    difficulty: Array
    levels: Array
    scoring: Scores
    costs: Costs

    def __len__(self) -> int:
        """How many instances there are."""

    def facts(self) -> dict[str, Array]:
        """What is known of each instance before any decision, by name, each ``[n]``."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Which rows these are."""


class Core(Protocol):
    """Draws instances, observes them, and scores decisions on them.

    Attributes:
        config: The env's configuration.
        nvec: Sizes of a decision's components, int64 ``[components]``.
        decision_nvec: Sizes of a mask's components, int64 ``[switches + 1]``.
        stages: Names of the stages of an episode, in execution order.
        steps: Which components of a decision each stage makes.
        actions: How an agent says its decisions.
        observation: What is seen before the first layer; it has a ``space``.
        stage_observation: What is seen at the stages.
        observation_space: Of one observation.
        backbone: The backbone, with ``name``, ``weights`` and ``board``; of a table it is not there to run.
        data: Which rows each split has.
        switch_names: What each component of a decision but the last one skips.
        n_switches: Number of switches of the backbone.
        highest_flops_ratio: A bound on the FLOPs ratio of any decision.
        is_staged: Whether anything is decided elsewhere than before the first layer.
    """

    config: EnvConfig
    nvec: Array
    decision_nvec: Array
    stages: list[str]
    steps: Steps
    actions: Actions
    observation: Any
    stage_observation: StageLooks
    backbone: Any
    data: Any
    switch_names: list[str]
    observation_space: gym.Space
    n_switches: int
    highest_flops_ratio: float
    is_staged: bool

    def split(self, name: str) -> Split:
        """A split by name."""

    def episodes(self, n: int) -> Episodes:
        """A batch of ``n`` episodes."""

    def observe(self, split: Split, rows: Array) -> Observations:
        """What is seen of rows ``[n]`` of a split before the first layer: new arrays."""

    def walk(
        self, split: Split, rows: Array, decide: Callable[[Observations], Array]
    ) -> tuple[Array, PassState | None]:
        """Decide on rows, from stage to stage."""

    def score(self, split: Split, rows: Array, decisions: Array, seen: PassState | None = None) -> Outcome:
        """What comes of one decision an instance.

        Raises:
            ValueError: If the decisions are malformed.
        """

    def to_masks(self, decisions: Array) -> Array:
        """Decisions ``[n, components]`` as masks, int64 ``[n, switches + 1]``."""

    def from_masks(self, masks: Array) -> Array:
        """Masks ``[n, switches + 1]`` as decisions, int64 ``[n, components]``."""

    def export(self) -> Export | None:
        """What a policy takes along when it leaves this env; ``None``: it cannot."""

    def scores(self) -> dict[str, dict[str, Any]]:
        """What is remembered of each split, by its name."""

    def load_scores(self, scores: dict[str, dict[str, Any]]) -> None:
        """Remember these scores and no others."""
