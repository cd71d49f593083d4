"""The core of an env that looks up what decisions do in a table (``sd_gym.envs.table_files``), and its splits.

Nothing here needs torch, a backbone or a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.config import EnvConfig
from sd_gym.envs.actions import MaskActions, MultiDiscreteActions, Steps, all_decisions, read_masks
from sd_gym.envs.episodes import StagedEpisodes
from sd_gym.envs.first_look import FirstLook
from sd_gym.envs.protocols import Core, Outcome
from sd_gym.envs.table_files import (
    CLASS_LOG_ODDS,
    CODEBOOK,
    EXPORT,
    FACT,
    JUDGED,
    PROJECTION,
    SPENT,
    observations_at,
    read_description,
    table_folder,
)
from sd_gym.envs.table_scores import TableCosts, TableScoring, packed_length
from sd_gym.files import map_arrays, read_json
from sd_gym.projection import Projection, read_projection

if TYPE_CHECKING:  # it needs torch
    from sd_gym.envs.export import Export

Array = NDArray


def _place_values(sizes: Sequence[int] | Array) -> Array:
    """What each component counts in the number of a decision: the last one changes first."""
    return np.cumprod([1, *sizes[:0:-1]], dtype=np.int64)[::-1].copy()


class TableData:
    """Which rows of which data set a table is of."""

    def __init__(self, splits: dict[str, dict[str, Any]]) -> None:
        self._splits = splits

    def __getitem__(self, name: str) -> SimpleNamespace:
        """``identity`` of a split, by its name."""
        return SimpleNamespace(identity=self._splits[name]["identity"])

    def identity(self) -> dict[str, dict[str, Any]]:
        """Which rows each split has."""
        return {name: described["identity"] for name, described in self._splits.items()}


class TableObservation:
    """What was observed of each instance when the table was made; ``projection`` reduced it to what the table has."""

    def __init__(self, described: dict[str, Any], projection: Projection | None, looks: int) -> None:
        self.projection, self.flops = projection, 0 if projection is None else looks * projection.flops
        self.shape = tuple(described["shape"])
        low, high = (np.full(self.shape, described[key], dtype=np.float32) for key in ("low", "high"))
        self.space = gym.spaces.Box(low, high, dtype=np.float32)

    def observe(self, split: TableSplit, rows: Array) -> Array:
        """New arrays, float32 ``[n, ...]``."""
        return np.take(split.tensors["observations"], rows, axis=0).astype(np.float32, copy=False)


class TableStages:
    """What was observed at the stages when the table was made: the ``StageLooks`` of a core that decides at several."""

    def __init__(self, core: TableCore, ways: list[int], judgements: int) -> None:
        self.space, self._judgements, self.judges = core.observation.space, judgements, judgements > 0
        self._place = [_place_values(ways[:stage]) for stage in range(len(ways))]
        self._stages, self._masks_of = len(core.stages), core.masks_of

    def observe(
        self, split: TableSplit, rows: Array, stage: int, decisions: Array, resume_from: object
    ) -> tuple[Array, None]:
        """Float32 ``[n, size]``, and no pass to go on from; see ``StageLooks.observe``."""
        if stage == len(self._place):
            return self._at_answer(split, rows, decisions), None
        observed = split.tensors[observations_at(stage)]
        if stage == 0:
            return np.take(observed, rows, axis=0).astype(np.float32, copy=False), None
        return observed[rows, decisions[:, :stage] @ self._place[stage]].astype(np.float32, copy=False), None

    def _at_answer(self, split: TableSplit, rows: Array, decisions: Array) -> Array:
        """What the stage before has shown, the FLOPs that were spent, and what the head says of its answer."""
        masks, judged = self._masks_of(decisions), split.tensors[JUDGED]
        seen, _ = self.observe(split, rows, self._stages - 2, decisions, None)
        seen[:, : self._stages] = 0
        seen[:, self._stages - 1] = 1
        seen[:, self._stages] = split.tensors[SPENT][split.tensors["costs"][rows], masks]
        seen[:, seen.shape[1] - judged.shape[2] :] = judged[rows, masks]
        return seen

    def episodes(self, core: Core, n: int, info_text: bool) -> StagedEpisodes:
        """A batch of episodes of a step a stage."""
        return StagedEpisodes(core, n, info_text)

    def judging_flops(self, split: TableSplit, rows: Array) -> Array:
        """FLOPs of the head's judgements in one episode of each row, int64 ``[n]``."""
        return self._judgements * split.costs.head_flops(rows)


class TableLookup:
    """What whole decisions lead to, an instance at a time, as plain numbers: arrays of one are four times slower."""

    def __init__(self, core: TableCore) -> None:
        self._core = core

    def outcome(self, split: TableSplit, row: int, decisions: Array) -> tuple[Outcome, Array]:
        """What comes of one row under decisions ``[1, components]``, and the mask that they are."""
        number = int(self._core.masks_of(decisions)[0])
        numbers: Any = (*split.scoring.of_one(row, number), split.costs.ratio_of_one(row, number))
        return Outcome(*numbers), self._core.masks[number].copy()

    def observation(self, split: TableSplit, row: int) -> Array:
        """A new array, float32, of what is observed of a row."""
        return split.tensors["observations"][row].astype(np.float32)


class TableInstance(NamedTuple):
    """An instance of a table, which has none of its texts."""

    id: str


class TableLengths(NamedTuple):
    """How long the instances of a table are, int64 ``[n]``, and which were cut, bool ``[n]``."""

    source_length: Array
    source_cut: Array
    target_cut: Array


class TableSplit:
    """One split of a table, a ``Split``; raises ``ValueError`` if its files are damaged, or belong to another table."""

    def __init__(self, core: TableCore, name: str) -> None:
        self.core, self.name, self.config = core, name, core.config
        self._described = core.description["splits"][name]
        self.tensors = map_arrays(core.folder / f"{name}.safetensors")
        words = read_json(core.folder / f"{name}.json")
        self._check(words)
        self.ids = np.array(words["ids"], dtype=object)
        self._words = {fact: np.array(values) for fact, values in words["facts"].items()}
        self.difficulty, self.levels = self._whole("difficulty"), self._whole("levels")
        self.instances = [TableInstance(identity) for identity in self.ids]
        self.number_of = {identity: row for row, identity in enumerate(self.ids)}
        self.encoded = TableLengths(*map(self._whole, TableLengths._fields))
        self.scoring = TableScoring(self.tensors, len(core.masks), core.answers_of)
        points = core.description.get("resume_points", [0])
        self.costs = TableCosts(self.tensors, core.masks, core.masks_of, core.goes_on, points)

    def __reduce__(self) -> tuple[Any, ...]:
        return TableCore.split, (self.core, self.name)

    def __len__(self) -> int:
        return int(self._described["instances"])

    def _check(self, words: dict[str, Any]) -> None:
        """Raise ``ValueError`` if the shapes are not those that ``table.json`` speaks of."""
        core, n = self.core, len(self)
        costs = len(self.tensors.get("switched", ()))  # how many different ones instances have
        levels, switches = int(core.decision_nvec[-1]), len(core.decision_nvec) - 1
        expected = {
            "quality": (n, packed_length(self.tensors, len(core.masks))),
            "always": (costs, levels),
            "switched": (costs, levels, switches),
            **{observations_at(stage): (n, *shape) for stage, shape in enumerate(core.looks)},
        }
        if core.has_answer_stage:
            said = self.tensors[JUDGED].shape[-1] if JUDGED in self.tensors else 0
            expected |= {JUDGED: (n, len(core.masks), said), SPENT: (costs, len(core.masks))}
        keys = ("difficulty", "levels", "source_length", "source_cut", "target_cut", "costs")
        expected |= dict.fromkeys(keys, (n,))
        file = core.folder / f"{self.name}.safetensors"
        for key, shape in expected.items():
            actual = self.tensors[key].shape if key in self.tensors else None
            if actual != shape:
                raise ValueError(f"{file} is damaged: expected {key} of shape {shape}, got {actual}; copy it again")
        values = self.tensors.get("quality_values")
        if values is not None and len(values) > 2 and n and self.tensors["quality"].max() >= len(values):
            raise ValueError(f"{file} is damaged: its qualities are none of its {len(values)} values; copy it again")
        if n and self.tensors["costs"].max() >= costs:
            raise ValueError(f"{file} is damaged: instances have costs that it lacks; copy it again")
        if not isinstance(words.get("facts"), dict) or len(words.get("ids", ())) != n:
            raise ValueError(f"{file.with_suffix('.json')} is damaged: expected the ids of {n} instances")

    def confidence(self, rows: Array, decisions: Array) -> Array:
        """Highest class probability of rows ``[n]`` under decisions ``[n, components]``, of a core that sees it."""
        log_odds = self.tensors[JUDGED][rows, self.core.masks_of(decisions), 0].astype(np.float64)
        return 1 / (1 + np.exp(-log_odds))

    def _whole(self, name: str) -> Array:
        """Numbers that are kept in the smallest type, as the env has them: int64, float64 or bool."""
        kept = self.tensors[name]
        return kept if kept.dtype == np.bool_ else kept.astype(np.float64 if kept.dtype.kind == "f" else np.int64)

    def facts(self) -> dict[str, Array]:
        """What is known of each instance before any decision, by name, each ``[n]``."""
        names = self._described["facts"]
        return {name: self._words[name] if name in self._words else self._whole(FACT + name) for name in names}

    @property
    def provenance(self) -> dict[str, Any]:
        """Which rows these are."""
        return self._described["provenance"]


class TableCore(Core[TableSplit]):
    """What a table knows, as ``BackboneCore`` computes it; shared by all envs of the same configuration.

    Where the table has all decisions, they are those of the env that it is of. Where it has some, a decision has one
    component: the number of its mask, of which 0 is the dense one, from there down in FLOPs; or one for each layer,
    where the masks are all that skip whole layers. Of several stages it has one for each: the number of the way in
    which the stage decides, of which 0 runs all. With ``stages=["first"]`` all of these are decided at once.
    Raises ``FileNotFoundError`` if there is no table, ``ValueError`` if it is damaged.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config, self.folder = config, table_folder(config.table or "")
        self.description = described = read_description(self.folder)
        self.decision_nvec = np.array(described["nvec"], dtype=np.int64)
        self.exhaustive, codebook = not described.get("chosen"), self.folder / CODEBOOK
        self.masks = all_decisions(self.decision_nvec) if self.exhaustive else read_masks(codebook, self.decision_nvec)
        if self.masks[0].any():
            raise ValueError(f"{codebook} is damaged: expected the dense mask first; copy it again")
        at_once = list(config.stages) == ["first"]
        ways, all_ways = None if at_once else described.get("ways"), described.get("ways")
        self.stages = list(described["stages"]) if ways else ["first"]
        answers = [2] * self.has_answer_stage
        units = described.get("units", {})
        sizes = all_ways or units.get("sizes") or [len(self.masks)]
        self.nvec = self.decision_nvec if self.exhaustive else np.array([*sizes, *answers])
        self._place = np.pad(_place_values(self.nvec[: self.n_skips]), (0, int(self.has_answer_stage)))
        # Of units, the masks are in the order of their FLOPs, not in that of the choices.
        self._order = None if "order" not in units else np.array(units["order"], dtype=np.int64)
        own = [np.array([stage]) for stage in range(len(self.stages))] if ways else [np.arange(len(self.nvec))]
        places = [np.zeros(1, dtype=np.int64)] * len(own) if ways else own
        self.steps = Steps(own, places, self.nvec, answers=self.has_answer_stage)
        names = described["backbone"]["switches"]  # such as encoder.3.attention
        switches = [SimpleNamespace(name=name, index=int(name.split(".")[1])) for name in names]
        board = SimpleNamespace(switches=switches, names=names)
        self.backbone = SimpleNamespace(
            name=described["backbone"]["name"], weights=described["backbone"]["weights"], board=board
        )
        self.switch_names = names if self.exhaustive else units.get("names", [])
        # Above 1 where ranking tokens may have run a part of the backbone.
        self.highest_flops_ratio = 1.0 + (self.decision_nvec[-1] > 1) + self.has_answer_stage
        self.data = TableData(described["splits"])
        self._decided = MultiDiscreteActions(config, self.nvec)
        is_whole = self.exhaustive or units or (at_once and all_ways)
        self.actions = self._decided if is_whole else MaskActions(int(self.steps.choices[0]))
        reduced = described.get("pca") is not None
        projection = read_projection(self.folder / PROJECTION) if reduced else None
        self.observation = TableObservation(described["observation"], projection, len(self.stages))
        shape, before = self.observation.shape, np.cumprod([1, *(ways or [])]).tolist()
        looks = len(ways or [0])
        self.looks = [(count, *shape) if stage else shape for stage, count in enumerate(before[:looks])]
        self._ways, self._splits = ways, dict[str, TableSplit]()
        self.lookup = None if ways else TableLookup(self)  # ``None``: a decision takes several steps

    def __reduce__(self) -> tuple[Any, ...]:
        return table_core, (self.config,)

    @property
    def sees_confidence(self) -> bool:
        """Whether the table has judgements, the first of which is the log-odds of a class."""
        return self.description.get("judgement", [""])[0] == CLASS_LOG_ODDS

    @cached_property
    def stage_observation(self) -> TableStages | FirstLook:
        """What was seen at the stages."""
        return TableStages(self, self._ways, self.description["judges"]) if self._ways else FirstLook(self)

    def split(self, name: str) -> TableSplit:
        """A split by name, mapped when first asked for; raises ``ValueError`` if the table has none of that name."""
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

    def answers_of(self, decisions: Array) -> Array:
        """The numbers, int64 ``[n]``, of the masks whose answers decisions ``[n, components]`` give."""
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
        return np.stack([*np.unravel_index(numbers, self.nvec[: self.n_skips]), *accepted], axis=1)

    def export(self) -> Export | None:
        """What a policy takes along to the env that the table is of; raises ``ValueError`` if the table is damaged.

        ``None`` where that env has nothing to take along, or where its stages are one, which sees what no env of one
        stage shows.
        """
        from sd_gym.envs.export import Export
        from sd_gym.policy.protected_tokens import ProtectedTokens
        from sd_gym.tasks.ranking import RANKINGS

        described, file = self.description, self.folder / EXPORT
        if not file.is_file() or described.get("ways") != self._ways:
            return None
        arrays = {name: np.array(values) for name, values in map_arrays(file).items()}
        of_table = all_decisions(self.nvec)
        env = {"id": described["env"], "table": None, "action": "multi_discrete", "codebook": None}
        try:
            protection, context = described["protection"], described.get("context")
            return Export(
                self.config.model_copy(update=env),
                {key: value for key, value in described["backbone"].items() if key != "switches"},
                arrays["mean"],
                arrays["deviation"],
                arrays.get("rarity"),
                protection and ProtectedTokens.from_json(protection),
                None if self.exhaustive else self.joined(self.to_masks(of_table), self.goes_on(of_table)),
                self.observation.projection,
                context=context and ProtectedTokens.from_json(context),
                ranking_costs_flops=RANKINGS.find(self.config.tokens.ranking).costs_flops,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.folder} is damaged: {error}; copy it again") from error

    def score(self, split: TableSplit, rows: Array, decisions: Array, seen: object = None) -> Outcome:
        """What comes of one decision an instance; of a table nothing is seen; see ``Core.score``."""
        decisions = self.checked(decisions, len(rows))
        quality, quality_ref = split.scoring.quality(rows, decisions)
        return Outcome(quality, quality_ref, split.costs.flops_ratio(rows, decisions))

    def checked(self, decisions: Any, n: int) -> Array:
        """Decisions, int64 ``[n, components]``; raises ``ValueError`` if the table does not have them."""
        return self._decided.decisions(decisions, n)

    def decided_logits(self, *_: Any) -> NoReturn:
        """Raises ``ValueError``: there are none."""
        raise ValueError(f"{self.folder}: a table has outcomes, and no backbone to run; use the env that it is of")


@lru_cache(maxsize=8)
def table_core(config: EnvConfig) -> TableCore:
    """The core of a configuration that has a ``table``."""
    return TableCore(config)
