"""The core of an env that looks up outcomes in a table (``sd_gym.envs.table_files``), and its splits.

Nothing here needs torch, a backbone or a data set.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from operator import index
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.config import EnvConfig
from sd_gym.envs.actions import StageActions, all_decisions, indices_as_actions, read_masks
from sd_gym.envs.protocols import Core
from sd_gym.envs.spaces import FirstStageObserver
from sd_gym.envs.table_files import (
    CODEBOOK,
    EXPORT,
    FACT,
    JUDGED,
    PROJECTION,
    READ,
    SPENT,
    naming_damage,
    observations_at,
    read_table,
    table_folder,
)
from sd_gym.envs.table_scores import TableCosts, TableScoring, packed_length
from sd_gym.files import file_states, map_arrays, read_json
from sd_gym.projection import Projection, read_projection

if TYPE_CHECKING:  # it needs torch
    from sd_gym.envs.export import Export


LENGTHS = "source_length", "source_cut", "target_cut"  # in the file of a split


class TableObservation:
    """The observations that were made with the table, reduced by its ``projection`` if it has one."""

    def __init__(self, described: dict[str, Any], projection: Projection | None, stages: int) -> None:
        self.projection = projection
        self.flops = 0 if projection is None else stages * projection.flops
        self.shape = tuple(described["shape"])
        low, high = (np.full(self.shape, described[key], dtype=np.float32) for key in ("low", "high"))
        self.space = gym.spaces.Box(low, high, dtype=np.float32)

    def observe(self, split: TableSplit, rows: Array) -> Array:
        """Observations of rows ``[n]``: new arrays, float32 ``[n, ...]``."""
        return np.take(split.tensors["observations"], rows, axis=0).astype(np.float32, copy=False)


class TableStageObserver:
    """The ``StageObserver`` of a table with several stages: the observations that were made with it."""

    def __init__(self, core: TableCore, ways: list[int], judgements: int) -> None:
        self.space = core.observation.space
        self.judgements = judgements
        self.judges = judgements > 0
        self.answer_size = len(core.description["judgement"]) if core.has_answer_stage else 0
        self._ways = ways
        self._stages = len(core.stages)
        self._masks_of = core.masks_of

    def observe(
        self, split: TableSplit, rows: Array, stage: int, decisions: Array, resume_from: object
    ) -> tuple[Array, None]:
        """Observations, float32 ``[n, size]``, and no state: nothing runs; see ``StageObserver.observe``."""
        if stage == len(self._ways):
            return self._at_answer(split, rows, decisions), None
        at = (rows, np.ravel_multi_index(tuple(decisions[:, :stage].T), self._ways[:stage])) if stage else rows
        return split.tensors[observations_at(stage)][at].astype(np.float32, copy=False), None

    def _at_answer(self, split: TableSplit, rows: Array, decisions: Array) -> Array:
        """The observation of the stage before, with the FLOPs spent and the head's judgement of its answer."""
        masks, judged = self._masks_of(decisions), split.tensors[JUDGED]
        observed, _ = self.observe(split, rows, self._stages - 2, decisions, None)
        observed[:, : self._stages] = 0
        observed[:, self._stages - 1] = 1
        observed[:, self._stages] = split.tensors[SPENT][split.tensors["costs"][rows], masks]
        observed[:, observed.shape[1] - judged.shape[2] :] = judged[rows, masks]
        return observed


class TableSplit:
    """One split of a table, a ``Split``.

    Raises:
        ValueError: If its files are damaged, or do not fit the table.
    """

    def __init__(self, core: TableCore, name: str) -> None:
        self.core = core
        self.name = name
        self.config = core.config
        self._described = core.description["splits"][name]
        self.tensors = map_arrays(core.folder / f"{name}.safetensors")
        texts = read_json(core.folder / f"{name}.json")
        self._check(texts)
        self.ids = np.array(texts["ids"], dtype=object)
        numbers = {key.removeprefix(FACT): self._whole(key) for key in self.tensors if key.startswith(FACT)}
        self._facts = numbers | {fact: np.array(values) for fact, values in texts["facts"].items()}
        self.difficulty, self.levels = self._whole("difficulty"), self._whole("levels")
        self.row_of = {identity: row for row, identity in enumerate(self.ids)}
        self.encoded = SimpleNamespace(**{key: self._whole(key) for key in LENGTHS})
        is_balanced = self.config.quality.kind == "balanced"
        self.scoring = TableScoring(self.tensors, len(core.masks), core.answers_of, is_balanced=is_balanced)
        points = [*map(index, core.description.get("resume_points", [0]))]
        self.costs = TableCosts(self.tensors, core.masks, core.masks_of, core.goes_on, points)

    def __reduce__(self) -> tuple[Any, ...]:
        return TableCore.split, (self.core, self.name)

    def __len__(self) -> int:
        return int(self._described["instances"])

    def _check(self, texts: dict[str, Any]) -> None:
        """Raise ``ValueError`` if shapes or values do not fit ``table.json``."""
        core, n = self.core, len(self)
        costs = len(self.tensors.get("switched", ()))  # number of different costs
        levels, switches = int(core.mask_nvec[-1]), len(core.mask_nvec) - 1
        expected = {
            "quality": (n, packed_length(self.tensors, len(core.masks))),
            "always": (costs, levels),
            "switched": (costs, levels, switches),
            **{observations_at(stage): (n, *shape) for stage, shape in enumerate(core.shapes)},
        }
        if core.has_answer_stage:
            judgement = self.tensors[JUDGED].shape[-1] if JUDGED in self.tensors else 0
            expected |= {JUDGED: (n, len(core.masks), judgement), SPENT: (costs, len(core.masks))}
            expected |= {READ: (costs, switches)} if READ in self.tensors else {}
        expected |= dict.fromkeys(("difficulty", "levels", "costs", *LENGTHS), (n,))
        file = core.folder / f"{self.name}.safetensors"
        for key, shape in expected.items():
            actual = self.tensors[key].shape if key in self.tensors else None
            if actual != shape:
                raise ValueError(f"{file} is damaged: expected {key} of shape {shape}, got {actual}; copy it again")
        values = self.tensors.get("quality_values")
        if values is not None and len(values) > 2 and n and self.tensors["quality"].max() >= len(values):
            raise ValueError(f"{file} is damaged: qualities are not among its {len(values)} values; copy it again")
        if n and self.tensors["costs"].max() >= costs:
            raise ValueError(f"{file} is damaged: instances have costs that it lacks; copy it again")
        if not isinstance(texts.get("facts"), dict) or len(texts.get("ids", ())) != n:
            raise ValueError(f"{file.with_suffix('.json')} is damaged: expected the ids of {n} instances")

    def _whole(self, name: str) -> Array:
        """A tensor, stored in the smallest type, as int64, float64 or bool."""
        values = self.tensors[name]
        dtype = np.float64 if values.dtype.kind == "f" else np.int64
        return values if values.dtype == np.bool_ else values.astype(dtype)

    def facts(self) -> dict[str, Array]:
        """Facts of each instance that are known before any decision, by name, each ``[n]``."""
        return self._facts

    @property
    def provenance(self) -> dict[str, Any]:
        """Which rows these are."""
        return self._described["provenance"]


class TableCore(Core[TableSplit]):
    """The outcomes in a table, as ``BackboneCore`` computes them; shared by all envs of the same configuration.

    The components of a decision depend on the masks in the table:

    * all masks: those of the original env;
    * some masks: one, the index of the mask; 0 is dense, and FLOPs fall with the index;
    * all masks that skip whole layers: one per layer;
    * several stages: one per stage, the index of its choice; 0 runs all. With ``stages=["first"]`` all are decided at
      once.

    Raises:
        FileNotFoundError: If there is no table.
        ValueError: If the table is damaged.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config = config
        self.folder = table_folder(config.table or "")
        self.description = described = read_table(self.folder)
        self.mask_nvec = np.array(described["nvec"], dtype=np.int64)
        self.exhaustive = not described.get("chosen")
        self.masks = all_decisions(self.mask_nvec) if self.exhaustive else self._codebook()
        all_ways = described.get("ways")
        units = described.get("units", {})
        at_once = list(config.stages) == ["first"]
        self._ways = ways = None if at_once else all_ways
        self.stages = list(described["stages"]) if ways else ["first"]
        sizes = all_ways or units.get("sizes") or [len(self.masks)]
        self.nvec = self.mask_nvec if self.exhaustive else np.array([*sizes, *[2] * self.has_answer_stage])
        self._sizes = self.nvec[: self.n_skips].tolist()
        # Masks of whole layers are ordered by FLOPs, not by choices.
        self._order = None if "order" not in units else np.array(units["order"], dtype=np.int64)
        own = [np.array([stage]) for stage in range(len(self.stages))] if ways else [np.arange(len(self.nvec))]
        self.stage_actions = StageActions(own, self.nvec)
        backbone = described["backbone"]
        names = backbone["switches"]  # such as encoder.3.attention
        switches = [SimpleNamespace(name=name, index=int(name.split(".")[1])) for name in names]
        board = SimpleNamespace(switches=switches, names=names)
        self.backbone = SimpleNamespace(name=backbone["name"], weights=backbone["weights"], board=board)
        self.switch_names = names if self.exhaustive else units.get("names", [])
        # Above 1 if ranking tokens may run a part of the backbone.
        self.highest_flops_ratio = 1.0 + (self.mask_nvec[-1] > 1) + self.has_answer_stage
        splits = described["splits"].items()
        self.data = {name: SimpleNamespace(identity=split["identity"]) for name, split in splits}
        is_whole = self.exhaustive or units or (at_once and all_ways)
        self.actions = self._decision_space if is_whole else indices_as_actions(int(self.stage_actions.choices[0]))
        reduced = described.get("pca") is not None
        projection = read_projection(self.folder / PROJECTION) if reduced else None
        self.observation = TableObservation(described["observation"], projection, len(self.stages))
        shape, before = self.observation.shape, np.cumprod([1, *(ways or [1])[:-1]]).tolist()
        self.shapes = [(count, *shape) if stage else shape for stage, count in enumerate(before)]  # by stage
        self._splits = dict[str, TableSplit]()

    def _codebook(self) -> Array:
        """The masks of a table that does not have all."""
        file, masks = self.folder / CODEBOOK, read_masks(self.folder / CODEBOOK, self.mask_nvec)
        if masks[0].any():
            raise ValueError(f"{file} is damaged: expected the dense mask first; copy it again")
        if len(masks) != (count := self.description["masks"]):
            raise ValueError(f"{file} is damaged: expected {count} masks, got {len(masks)}; copy it again")
        return masks

    def __reduce__(self) -> tuple[Any, ...]:
        return table_core, (self.config,)

    @cached_property
    def stage_observer(self) -> TableStageObserver | FirstStageObserver:
        """The observations at the stages."""
        with naming_damage(self.folder):
            return (
                TableStageObserver(self, self._ways, self.description["judges"])
                if self._ways
                else FirstStageObserver(self)
            )

    def split(self, name: str) -> TableSplit:
        """A split by name, mapped into memory on first use; raises ``ValueError`` for an unknown name."""
        if name not in self._splits:
            if name not in self.description["splits"]:
                raise ValueError(f"{self.folder} has no split {name!r}; it has {', '.join(self.description['splits'])}")
            with naming_damage(self.folder):
                self._splits[name] = TableSplit(self, name)
        return self._splits[name]

    def masks_of(self, decisions: Array) -> Array:
        """Indices, int64 ``[n]``, of the masks of decisions ``[n, components]``."""
        numbers = np.asarray(np.ravel_multi_index(tuple(decisions[:, : len(self._sizes)].T), self._sizes))
        return numbers if self._order is None else self._order[numbers]

    def answers_of(self, decisions: Array) -> Array:
        """Indices, int64 ``[n]``, of the masks whose answers count: dense (0) where a row goes on."""
        numbers = self.masks_of(decisions)
        return np.where(self.goes_on(decisions), 0, numbers) if self.has_answer_stage else numbers

    def to_masks(self, decisions: Array) -> Array:
        """Decisions ``[n, components]`` as masks, int64 ``[n, switches + 1]``."""
        return np.array(decisions, dtype=np.int64) if self.exhaustive else self.masks[self.masks_of(decisions)]

    def from_masks(self, masks: Array) -> Array:
        """Masks as decisions, int64 ``[n, components]``; raises ``ValueError`` if the table has no such mask."""
        if self.exhaustive:
            return np.array(masks, dtype=np.int64)
        number_of = {tuple(mask): number for number, mask in enumerate(self.masks.tolist())}
        try:
            numbers = np.array([number_of[tuple(mask)] for mask in np.asarray(masks).tolist()], dtype=np.int64)
        except KeyError as error:
            raise ValueError(f"{self.folder} has no mask {list(error.args[0])}") from error
        numbers = numbers if self._order is None else np.argsort(self._order)[numbers]
        accepted = [np.zeros_like(numbers)] * self.has_answer_stage
        return np.stack([*np.unravel_index(numbers, self._sizes), *accepted], axis=1)

    def export(self) -> Export | None:
        """What a policy needs on the original env; raises ``ValueError`` if the table is damaged.

        ``None`` if no policy can leave that env, or if ``stages=["first"]`` merges its stages: no env of one stage has
        such observations.
        """
        from sd_gym.envs.export import Export
        from sd_gym.policy.token_rule import TokenRule
        from sd_gym.tasks.ranking import RANKINGS

        described, file = self.description, self.folder / EXPORT
        if not file.is_file() or described.get("ways") != self._ways:
            return None
        arrays = {name: np.array(values) for name, values in map_arrays(file).items()}
        of_table = all_decisions(self.nvec)
        env = {"id": described["env"], "table": None, "action": "multi_discrete", "codebook": None}
        with naming_damage(self.folder):
            protection, context = described["protection"], described.get("context")
            return Export(
                env=self.config.model_copy(update=env),
                backbone={key: value for key, value in described["backbone"].items() if key != "switches"},
                mean=arrays["mean"],
                deviation=arrays["deviation"],
                rarity=arrays.get("rarity"),
                protection=protection and TokenRule.from_json(protection),
                masks=None if self.exhaustive else self.joined(self.to_masks(of_table), of_table[:, -1]),
                projection=self.observation.projection,
                context=context and TokenRule.from_json(context),
                ranking_costs_flops=RANKINGS.find(self.config.tokens.ranking).costs_flops,
            )


def table_core(config: EnvConfig) -> TableCore:
    """The core of a configuration that has a ``table``; a new one if the table has been made again."""
    folder = table_folder(config.table or "")
    with naming_damage(folder):
        return _table_core(config, file_states(folder / "table.json"))


@lru_cache(maxsize=8)
def _table_core(config: EnvConfig, read: tuple[Any, ...]) -> TableCore:
    return TableCore(config)
