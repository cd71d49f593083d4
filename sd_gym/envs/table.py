"""A table: what decisions do to instances, computed once; and the core of an env that looks it up.

Nothing here needs torch, a backbone or a data set. A table is a folder:

* ``table.json``: of which env it is (its config), the hashes of its data and backbone, the switches, the observation.
* ``codebook.json``, where only some decisions are in it: which, a mask a line, the dense one first. An env with
  ``action="discrete"`` takes the folder as its ``codebook``. Of several stages they are all ways to decide the first
  one with all ways to decide the second one, and so on, in this order.
* ``SPLIT.safetensors`` of each split, mapped into memory: ``quality [n, masks]``, as numbers of ``quality_values``
  where there are few different ones; ``likelihood [n, masks]``, float16; ``always [lengths, levels]`` and
  ``switched [lengths, levels, switches]``, int64, of which FLOPs are the sum, and ``costs [n]``, which of them an
  instance has; ``observations``, float32, or float16 where they are reduced, and of a later stage K, under all ways
  to come to it, ``observations.K [n, ways before it, size]``; the difficulty and the facts of each
  instance, in the smallest type that holds them exactly.
* ``SPLIT.json``: the ids of the instances, and those of their facts that are words.
* ``projection.safetensors``, where observations are reduced: how (``sd_gym.projection``).
* ``export.safetensors``: what standardises observations and ranks tokens, so that a policy that learned here decides
  on the env itself, or on texts. A table of an env that no policy can leave has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.config import EnvConfig
from sd_gym.envs.episodes import EpisodicCore, FirstLook, Steps
from sd_gym.envs.outcome import Outcome
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import Actions, MultiDiscreteActions, read_masks
from sd_gym.envs.table_split import TableSplit, at_stage
from sd_gym.errors import short
from sd_gym.files import read_json
from sd_gym.objectives import quality_cost
from sd_gym.projection import Projection, read_projection
from sd_gym.registration import CONFIG_FOLDER

if TYPE_CHECKING:  # it needs torch
    from sd_gym.envs.export import Export

Array = NDArray
FORMAT = 2
CODEBOOK, PROJECTION, EXPORT = "codebook.json", "projection.safetensors", "export.safetensors"
MOST = 4096  # decisions; where there are no more, a table has all of them


def table_folder(name: str | Path) -> Path:
    """The folder of a table: of the package, such as ``tables/summarization-mini``, or a path."""
    bundled = CONFIG_FOLDER / name
    return bundled if bundled.is_dir() else Path(name)


def read_description(folder: Path) -> dict[str, Any]:
    """What ``table.json`` says of a table that is complete.

    Raises:
        FileNotFoundError: If the folder holds no table.
        ValueError: If it is damaged, not complete, or of another version.
    """
    file = folder / "table.json"
    if not file.is_file():
        raise FileNotFoundError(f"no table.json in {folder}; expected a table, as sd-gym tabulate writes it")
    said = read_json(file)
    if said.get("format") != FORMAT:
        raise ValueError(
            f"{file}: expected a table of format {FORMAT}, got {short(said.get('format'))} (written by sd_gym "
            f"{short(said.get('sd_gym'))}); make it again, or take the version that wrote it"
        )
    kinds = {"env": str, "env_config": dict, "backbone": dict, "nvec": list, "observation": dict, "splits": dict}
    for key, kind in kinds.items():
        if not isinstance(said.get(key), kind):
            raise ValueError(f"{file} is damaged: {key!r} is {short(said.get(key))}; copy it again")
    if not said.get("complete"):
        raise ValueError(f"{folder}: the table is not complete; go on with sd-gym tabulate --resume")
    return said


def all_decisions(nvec: Array) -> Array:
    """All there are, in the order of their numbers, the dense one first: int64 ``[prod(nvec), components]``."""
    return np.array(list(product(*map(range, nvec))), dtype=np.int64)


def _place_values(sizes: Sequence[int] | Array) -> Array:
    """What each component counts in the number of a decision: the last one changes first."""
    return np.cumprod([1, *sizes[:0:-1]], dtype=np.int64)[::-1].copy()


class MaskActions(Actions):
    """The number of one of the masks of a table, ``Discrete``."""

    def __init__(self, masks: int) -> None:
        super().__init__(gym.spaces.Discrete(masks), np.array([masks]), f"the number of one of {masks} masks")

    def _decided(self, actions: Array) -> Array:
        return actions[:, None]


class TableSwitch(NamedTuple):
    """A switch of the backbone that a table is of, by its name, such as ``encoder.3.attention``."""

    name: str

    @property
    def index(self) -> int:
        """Of its layer in the stack."""
        return int(self.name.split(".")[1])


class TableBoard(NamedTuple):
    """The switches of the backbone that a table is of."""

    switches: list[TableSwitch]

    @property
    def names(self) -> list[str]:
        """Their names, in execution order."""
        return [switch.name for switch in self.switches]


class TableBackbone(NamedTuple):
    """The backbone that a table is of, which is not there.

    Attributes:
        name: As in the env's config.
        weights: Hash of its weights.
        board: Its switches.
    """

    name: str
    weights: str
    board: TableBoard


class TableData:
    """Which rows of which data set a table is of."""

    def __init__(self, splits: dict[str, dict[str, Any]]) -> None:
        self._splits = splits

    def __getitem__(self, name: str) -> SimpleNamespace:
        """``identity`` of a split, by its name."""
        return SimpleNamespace(identity=self._splits[name]["identity"])

    def identity(self) -> dict[str, dict[str, Any]]:
        """Which rows each split has."""
        return {name: said["identity"] for name, said in self._splits.items()}


class TableObservation:
    """What was observed of each instance when the table was made.

    Args:
        said: What ``table.json`` says of it.
        projection: How it was reduced, if it was.

    Attributes:
        space: Of one observation.
        projection: From what the env observes to what the table has; ``None``: that is the same.
    """

    def __init__(self, said: dict[str, Any], projection: Projection | None) -> None:
        self.projection = projection
        low, high = (np.array(said[key], dtype=np.float32) for key in ("low", "high"))
        shape = tuple(said["shape"])
        self.space = gym.spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape), dtype=np.float32)

    @property
    def flops(self) -> int:
        """FLOPs of reducing one observation; 0 where it is not reduced."""
        return 0 if self.projection is None else self.projection.flops

    def observe(self, split: TableSplit, rows: Array) -> Array:
        """New arrays, float32 ``[n, ...]``."""
        return np.take(split.tensors["observations"], rows, axis=0).astype(np.float32, copy=False)


class TableStages:
    """What was observed at the stages when the table was made: a part of a ``TableCore`` that decides at several.

    Args:
        space: Of one observation.
        ways: How many ways to decide each stage has.
        judges: How many judgements of the head an episode has.
    """

    def __init__(self, space: gym.Space, ways: list[int], judges: int) -> None:
        self.space, self._judges = space, judges
        self._place = [_place_values(ways[:stage]) for stage in range(len(ways))]

    def observe(
        self, split: TableSplit, rows: Array, stage: int, decisions: Array, resume_from: None
    ) -> tuple[Array, None]:
        """What is seen of rows ``[n]`` at a stage under decisions ``[n, stages]``, float32 ``[n, size]``; no pass."""
        seen = split.tensors[at_stage(stage)]
        if stage == 0:
            return np.take(seen, rows, axis=0), None
        return seen[rows, decisions[:, :stage] @ self._place[stage]], None

    def judging_flops(self, split: TableSplit, rows: Array) -> Array:
        """FLOPs of the head's judgements in one episode of each row, int64 ``[n]``."""
        return self._judges * split.costs.head_flops(rows)


class TableCore(EpisodicCore):
    """What a table knows, as ``Core`` computes it; shared by all envs of the same configuration.

    Where the table has all decisions, they are those of the env that it is of. Where it has some, a decision has one
    component: the number of its mask, of which 0 is the dense one, from there down in FLOPs. Of several stages it has
    one for each: the number of the way in which the stage decides, of which 0 runs all. With ``stages=["first"]`` a
    table of several stages is one of some masks.

    Args:
        config: The env's configuration, whose ``table`` is the folder.

    Attributes:
        folder: Where the table is.
        description: What ``table.json`` says.
        masks: The decisions in it, int64 ``[masks, switches + 1]``.
        decision_nvec: Sizes of a decision's components, int64 ``[switches + 1]``.
        exhaustive: Whether it has all.
        nvec: Sizes of the components of what is decided.
        stages: Names of the stages of an episode.
        steps: Which of the components each stage decides.
        switch_names: What each of these components, but for the last one, skips.
        backbone: That it is of.
        data: That it is of.
        actions: How an agent says its decisions.
        observation: What it sees before the first layer.
        looks: Shape of all that is observed of an instance, for each stage.

    Raises:
        FileNotFoundError: If there is no table.
        ValueError: If it is damaged.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config, self.folder = config, table_folder(config.table)
        self.description = said = read_description(self.folder)
        self.decision_nvec = np.array(said["nvec"], dtype=np.int64)
        self.exhaustive = not said.get("chosen")
        self.masks = (
            all_decisions(self.decision_nvec)
            if self.exhaustive
            else read_masks(self.folder / CODEBOOK, self.decision_nvec)
        )
        if self.masks[0].any():
            raise ValueError(
                f"{self.folder / 'codebook.json'} is damaged: expected the dense mask first; copy it again"
            )
        ways = said.get("ways") if list(config.stages) != ["first"] else None
        self.stages = list(said["stages"]) if ways else ["first"]
        self.nvec = self.decision_nvec if self.exhaustive else np.array(ways or [len(self.masks)])
        self._place = _place_values(self.nvec)
        # Of combinations of ways, the masks are not in the order of their FLOPs.
        self._order = None if ways or "order" not in said else np.array(said["order"], dtype=np.int64)
        own = [np.array([stage]) for stage in range(len(ways))] if ways else [np.arange(len(self.nvec))]
        self.steps = Steps(own, [np.zeros(1, dtype=np.int64)] * len(ways) if ways else own, self.nvec)
        backbone = said["backbone"]
        board = TableBoard([TableSwitch(name) for name in backbone["switches"]])
        self.backbone = TableBackbone(backbone["name"], backbone["weights"], board)
        self.switch_names = board.names if self.exhaustive else []
        self.data = TableData(said["splits"])
        self.actions: Actions = (
            MultiDiscreteActions(config, self.nvec) if self.exhaustive else MaskActions(int(self.steps.choices[0]))
        )
        self._decided = MultiDiscreteActions(config, self.nvec)
        reduced = said.get("pca") is not None
        projection = read_projection(self.folder / PROJECTION) if reduced else None
        self.observation = TableObservation(said["observation"], projection)
        shape, before = self.observation.space.shape, np.cumprod([1, *(ways or [])]).tolist()
        self.looks = [(count, *shape) if stage else shape for stage, count in enumerate(before[: len(self.stages)])]
        self.stage_observation = TableStages(self.observation.space, ways, said["judges"]) if ways else FirstLook(self)
        self._splits: dict[str, TableSplit] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_core, (self.config,)

    @property
    def observation_space(self) -> gym.Space:
        """Of one observation."""
        return self.observation.space

    @property
    def highest_flops_ratio(self) -> float:
        """A bound on the FLOPs ratio of any decision: above 1 where ranking tokens may have run a part of it."""
        return 2.0 if self.decision_nvec[-1] > 1 else 1.0

    @property
    def n_switches(self) -> int:
        """Number of switches of the backbone."""
        return len(self.decision_nvec) - 1

    def split(self, name: str) -> TableSplit:
        """A split by name, mapped when first asked for.

        Raises:
            ValueError: If the table has none of that name.
        """
        if name not in self._splits:
            if name not in self.description["splits"]:
                raise ValueError(f"{self.folder} has no split {name!r}; it has {', '.join(self.description['splits'])}")
            self._splits[name] = TableSplit(self, name)
        return self._splits[name]

    def scores(self) -> dict[str, dict[str, Any]]:
        """Nothing: there is nothing to remember of a table."""
        return {}

    def load_scores(self, scores: dict[str, dict[str, Any]]) -> None:
        """Nothing is remembered."""

    def masks_of(self, decisions: Array) -> Array:
        """The numbers, int64 ``[n]``, of the masks that decisions ``[n, components]`` are."""
        numbers = decisions @ self._place
        return numbers if self._order is None else self._order[numbers]

    def to_masks(self, decisions: Array) -> Array:
        """Decisions ``[n, components]`` as masks, int64 ``[n, switches + 1]``."""
        return np.array(decisions, dtype=np.int64) if self.exhaustive else self.masks[self.masks_of(decisions)]

    def from_masks(self, masks: Array) -> Array:
        """Masks ``[n, switches + 1]`` as decisions, int64 ``[n, components]``: the other way round.

        Raises:
            ValueError: If one is none of this table.
        """
        if self.exhaustive:
            return np.array(masks, dtype=np.int64)
        numbers = {tuple(mask): number for number, mask in enumerate(self.masks.tolist())}
        try:
            found = [numbers[tuple(mask)] for mask in np.asarray(masks).tolist()]
        except KeyError as error:
            raise ValueError(f"{self.folder} has no mask {list(error.args[0])}") from error
        numbers = np.array(found, dtype=np.int64)
        numbers = numbers if self._order is None else np.argsort(self._order)[numbers]
        return np.stack(np.unravel_index(numbers, self.nvec), axis=1)

    def export(self) -> Export | None:
        """As of the core of the env that the table is of."""
        from sd_gym.envs.export import of_table

        return of_table(self)

    def observe(self, split: TableSplit, rows: Array) -> Array:
        """What is seen of rows ``[n]`` of a split: new arrays, a row an instance."""
        return self.observation.observe(split, rows)

    def score(self, split: TableSplit, rows: Array, decisions: Array, seen: None = None) -> Outcome:
        """What comes of one decision an instance.

        Args:
            split: Where the instances are.
            rows: Their rows, int64 ``[n]``.
            decisions: ``[n, components]``.
            seen: As of ``Core.score``; of a table there is nothing.

        Raises:
            ValueError: If the decisions are malformed.
        """
        decisions = self.checked(decisions, len(rows))
        quality, quality_ref = split.scoring.quality(rows, decisions)
        cost = quality_cost(quality, quality_ref, self.config.reward.epsilon)
        return Outcome(quality, quality_ref, cost, split.costs.flops_ratio(rows, decisions))

    def checked(self, decisions: Any, n: int) -> Array:
        """Decisions, int64 ``[n, components]``; raises ``ValueError`` if they are none of this table."""
        return self._decided.decisions(decisions, n)

    def decided_logits(self, *_: Any) -> None:
        """There are none.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{self.folder}: a table has outcomes, and no backbone to run; use the env that it is of")


@lru_cache(maxsize=8)
def table_core(config: EnvConfig) -> TableCore:
    """The core of a configuration that has a ``table``."""
    return TableCore(config)


def number_of_decisions(nvec: Array) -> int:
    """How many there are."""
    return math.prod(int(size) for size in nvec)
