"""A split of a table: what is in its files, as an env looks it up. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.shared import shared_core
from sd_gym.files import map_arrays, read_json

if TYPE_CHECKING:
    from sd_gym.envs.config import EnvConfig
    from sd_gym.envs.table import TableCore

Array = NDArray
FACT = "fact."  # before the name of a fact, in the file of a split


def at_stage(stage: int) -> str:
    """Name of what is observed at a stage, in the file of a split."""
    return f"observations.{stage}" if stage else "observations"


class TableInstance(NamedTuple):
    """An instance of a table, which has none of its texts."""

    id: str


class TableScoring:
    """Qualities of a split's rows under decisions ``[n, components]``, as ``Scoring`` gives them."""

    def __init__(self, split: TableSplit) -> None:
        self._core, self._tensors = split.core, split.tensors
        self._codes, self._values = split.tensors["quality"], split.tensors.get("quality_values")
        self._dense = self._of(np.arange(len(split)), np.zeros(len(split), dtype=np.int64))

    def _of(self, rows: Array, masks: Array) -> Array:
        found = self._codes[rows, masks]
        return found.astype(np.float64) if self._values is None else self._values[found]

    def of_masks(self, rows: Array) -> Array:
        """Quality of rows ``[n]`` under all masks, float64 ``[n, masks]``."""
        found = self._codes[rows]
        return found.astype(np.float64) if self._values is None else self._values[found]

    def quality(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality under the decisions and dense quality, each float64 ``[n]``."""
        return self.run(rows, decisions), self._dense[rows]

    def run(self, rows: Array, decisions: Array) -> Array:
        """Quality under the decisions, float64 ``[n]``."""
        return self._of(rows, self._core.masks_of(decisions))

    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality, and the likelihood of the reference, which is rounded to float16; each float64 ``[n]``."""
        masks = self._core.masks_of(decisions)
        return self._of(rows, masks), self._tensors["likelihood"][rows, masks].astype(np.float64)

    def under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]:
        """``quality_and_likelihood`` of rows ``[n]`` under each of some decisions, each float64 ``[n, masks]``."""
        every = np.repeat(rows, len(masks)), np.tile(masks, (len(rows), 1))
        quality, likelihood = self.quality_and_likelihood(*every)
        return quality.reshape(len(rows), -1), likelihood.reshape(len(rows), -1)

    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]:
        """None: a data set's own metric is not the mean of anything that is in a table."""
        return {}

    def score_dense(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """All is known."""

    def scores(self) -> dict[str, Any]:
        """Nothing that would have to be known again."""
        return {}


class TableCosts:
    """FLOPs of a split's rows under decisions ``[n, components]``, as ``Costs`` gives them."""

    def __init__(self, split: TableSplit) -> None:
        self._core = split.core
        self._of = split.tensors["costs"]  # which of the costs an instance has
        self._always, self._switched = split.tensors["always"], split.tensors["switched"]
        self._runs = 1 - self._core.masks[:, :-1]
        self._level = self._core.masks[:, -1]
        self._dense = self._always[:, 0] + self._switched[:, 0].sum(axis=1)

    def flops(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions, int64 ``[n]``."""
        masks, of = self._core.masks_of(decisions), self._of[rows]
        level = self._level[masks]
        return self._always[of, level] + np.einsum("ns,ns->n", self._switched[of, level], self._runs[masks])

    def flops_ratio(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under the decisions over dense FLOPs, float64 ``[n]``."""
        return self.flops(rows, decisions) / self.dense_flops(rows)

    def dense_flops(self, rows: Array) -> Array:
        """FLOPs of the dense backbone, int64 ``[n]``."""
        return self._dense[self._of[rows]]

    def head_flops(self, rows: Array) -> Array:
        """FLOPs of the head, which no decision saves, int64 ``[n]``."""
        return self._always[self._of[rows], 0]

    def of_masks(self, rows: Array) -> Array:
        """FLOPs ratio of rows ``[n]`` under all masks, float64 ``[n, masks]``."""
        of = self._of[rows]
        found = np.empty((len(of), len(self._runs)))
        for level in np.unique(self._level):
            at = self._level == level
            # Products of whole numbers below 2^53 are exact in float64 too, which is multiplied much faster.
            switched = self._switched[of, level].astype(np.float64) @ self._runs[at].T.astype(np.float64)
            found[:, at] = self._always[of, level, None] + switched
        return found / self._dense[of, None]


class TableSplit:
    """One split of a table, as ``Split`` is one of a data set; it has no texts, and no passes.

    Args:
        core: The table's core.
        name: The split.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        core: The core.
        ids: Of the instances, strings ``[n]`` of dtype object.
        instances: The instances, in order.
        tensors: What the table has of them, by name.
        difficulty: Of each, int64 ``[n]``; 0 where it is not known.
        levels: Difficulty for reports, int64 ``[n]``.
        encoded: Their lengths, and which were cut.
        scoring: What their answers are worth.
        costs: The FLOPs of decisions on them.

    Raises:
        ValueError: If the split's files are damaged, or are none of this table.
    """

    def __init__(self, core: TableCore, name: str) -> None:
        self.core, self.name, self.config = core, name, core.config
        self._said = core.description["splits"][name]
        self.tensors = map_arrays(core.folder / f"{name}.safetensors")
        words = read_json(core.folder / f"{name}.json")
        self._check(words)
        self.ids = np.array(words["ids"], dtype=object)
        self._words = {fact: np.array(values) for fact, values in words["facts"].items()}
        self.difficulty, self.levels = self._whole("difficulty"), self._whole("levels")
        cut = {key: self.tensors[key] for key in ("source_cut", "target_cut")}
        self.encoded = SimpleNamespace(source_length=self._whole("source_length"), **cut)
        self.scoring, self.costs = TableScoring(self), TableCosts(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared_split, (self.config, self.name)

    def __len__(self) -> int:
        return int(self._said["instances"])

    def _check(self, words: dict[str, Any]) -> None:
        """Raise ``ValueError`` if the shapes are not those that ``table.json`` speaks of."""
        core, n = self.core, len(self)
        levels, switches = int(core.decision_nvec[-1]), len(core.decision_nvec) - 1
        expected = {
            "quality": (n, len(core.masks)),
            "likelihood": (n, len(core.masks)),
            "always": (self._different, levels),
            "switched": (self._different, levels, switches),
            **{at_stage(stage): (n, *shape) for stage, shape in enumerate(core.looks)},
        }
        keys = ("difficulty", "levels", "source_length", "source_cut", "target_cut", "costs")
        expected |= dict.fromkeys(keys, (n,))
        file = core.folder / f"{self.name}.safetensors"
        for key, shape in expected.items():
            came = self.tensors[key].shape if key in self.tensors else None
            if came != shape:
                raise ValueError(f"{file} is damaged: expected {key} of shape {shape}, got {came}; copy it again")
        values = self.tensors.get("quality_values")
        if values is not None and n and self.tensors["quality"].max() >= len(values):
            raise ValueError(f"{file} is damaged: its qualities are none of its {len(values)} values; copy it again")
        if n and self.tensors["costs"].max() >= self._different:
            raise ValueError(f"{file} is damaged: instances have costs that it lacks; copy it again")
        if not isinstance(words.get("facts"), dict) or len(words.get("ids", ())) != n:
            raise ValueError(f"{file.with_suffix('.json')} is damaged: expected the ids of {n} instances")

    @property
    def _different(self) -> int:
        """How many different costs instances have."""
        return len(self.tensors.get("switched", ()))

    def _whole(self, name: str) -> Array:
        """Numbers that are kept in the smallest type, as the env has them: int64, float64 or bool."""
        known = self.tensors[name]
        return known if known.dtype == np.bool_ else known.astype(np.float64 if known.dtype.kind == "f" else np.int64)

    @cached_property
    def instances(self) -> list[TableInstance]:
        """The instances, in order."""
        return [TableInstance(one) for one in self.ids]

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Row of each instance, by its id."""
        return {one: row for row, one in enumerate(self.ids)}

    def facts(self) -> dict[str, Array]:
        """What is known of each instance before any decision, by name, each ``[n]``."""
        names = self._said["facts"]
        return {name: self._words[name] if name in self._words else self._whole(FACT + name) for name in names}

    @property
    def provenance(self) -> dict[str, Any]:
        """Which rows these are."""
        return self._said["provenance"]


def _shared_split(config: EnvConfig, name: str) -> TableSplit:
    return shared_core(config).split(name)
