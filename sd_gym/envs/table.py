"""A table: what decisions do to instances, computed once; and the core of an env that looks it up.

Nothing here needs torch, a backbone or a data set. A table is a folder:

* ``table.json``: of which env it is (its config), the hashes of its data and backbone, the switches, the observation.
* ``codebook.json``, where only some decisions are in it: which, a mask a line, the dense one first. An env with
  ``action="discrete"`` takes the folder as its ``codebook``.
* ``SPLIT.safetensors`` of each split, mapped into memory: ``quality [n, masks]``, as numbers of ``quality_values``
  where there are few different ones; ``likelihood [n, masks]``, float16; ``always [lengths, levels]`` and
  ``switched [lengths, levels, switches]``, int64, of which FLOPs are the sum, and ``costs [n]``, which of them an
  instance has; ``observations``, float32, or float16 where they are reduced; the difficulty and the facts of each
  instance, in the smallest type that holds them exactly.
* ``SPLIT.json``: the ids of the instances, and those of their facts that are words.
* ``projection.safetensors``, where observations are reduced: how (``sd_gym.envs.projection``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.config import EnvConfig
from sd_gym.envs.outcome import Outcome
from sd_gym.envs.projection import Projection, read_projection
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import Actions, MultiDiscreteActions, read_masks
from sd_gym.errors import short
from sd_gym.files import map_arrays, read_json
from sd_gym.objectives import quality_cost
from sd_gym.registration import CONFIG_FOLDER

Array = NDArray
FORMAT = 2
CODEBOOK, PROJECTION = "codebook.json", "projection.safetensors"
MOST = 4096  # decisions; where there are no more, a table has all of them
FACT = "fact."  # before the name of a fact, in the file of a split


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


class TableInstance(NamedTuple):
    """An instance of a table, which has none of its texts."""

    id: str


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
            "observations": (n, *core.observation.space.shape),
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


class TableEpisodes:
    """A batch of episodes, each of one instance and one decision, as ``Episodes`` has them.

    Args:
        core: The table's core.
        n: How many there are.

    Attributes:
        over: Which are over, bool ``[n]``.
        decisions: What is decided, int64 ``[n, components]``.
    """

    def __init__(self, core: TableCore, n: int) -> None:
        self.core = core
        self._over = np.zeros(n, dtype=np.bool_)
        self.decisions = np.zeros((n, len(core.nvec)), dtype=np.int64)

    @property
    def over(self) -> Array:
        """Which are over, bool ``[n]``."""
        return self._over.copy()

    def begin(self, envs: Array) -> None:
        """Begin some anew."""
        self._over[envs], self.decisions[envs] = False, 0

    def decide(self, envs: Array, choices: Array) -> None:
        """Decide in some; ``choices [n, components]`` have a row for each of all episodes."""
        self.decisions[envs], self._over[envs] = choices[envs], True

    def outcome(self, split: TableSplit, rows: Array, envs: Array) -> Outcome:
        """What came of some, which are over."""
        return self.core.score(split, rows[envs], self.decisions[envs])

    def observe(self, split: TableSplit, rows: Array) -> Array:
        """What is seen of each, in new arrays."""
        return self.core.observe(split, rows)

    def masks(self) -> Array:
        """Which choices each may make, bool ``[n, choices]``: all."""
        return np.ones((len(self._over), int(self.core.actions.nvec.sum())), dtype=np.bool_)

    def state(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {"over": self._over.tolist(), "decisions": self.decisions.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._over, self.decisions = np.array(state["over"]), np.array(state["decisions"])


class TableCore:
    """What a table knows, as ``Core`` computes it; shared by all envs of the same configuration.

    Where the table has all decisions, they are those of the env that it is of. Where it has some, a decision has one
    component: the number of its mask, of which 0 is the dense one.

    Args:
        config: The env's configuration, whose ``table`` is the folder.

    Attributes:
        folder: Where the table is.
        description: What ``table.json`` says.
        masks: The decisions in it, int64 ``[masks, switches + 1]``.
        decision_nvec: Sizes of a decision's components, int64 ``[switches + 1]``.
        exhaustive: Whether it has all.
        nvec: Sizes of the components of what is decided.
        switch_names: What each of these components, but for the last one, skips.
        backbone: That it is of.
        data: That it is of.
        actions: How an agent says its decisions.
        observation: What it sees.

    Raises:
        FileNotFoundError: If there is no table.
        ValueError: If it is damaged.
    """

    stages: ClassVar[list[str]] = ["first"]
    is_staged = False

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
        self.nvec = self.decision_nvec if self.exhaustive else np.array([len(self.masks)])
        self._place = np.cumprod([1, *self.nvec[:0:-1]], dtype=np.int64)[::-1].copy()
        backbone = said["backbone"]
        board = TableBoard([TableSwitch(name) for name in backbone["switches"]])
        self.backbone = TableBackbone(backbone["name"], backbone["weights"], board)
        self.switch_names = board.names if self.exhaustive else []
        self.data = TableData(said["splits"])
        self.actions: Actions = (
            MultiDiscreteActions(config, self.nvec) if self.exhaustive else MaskActions(len(self.masks))
        )
        self._decided = MultiDiscreteActions(config, self.nvec)
        reduced = said.get("pca") is not None
        projection = read_projection(self.folder / PROJECTION) if reduced else None
        self.observation = TableObservation(said["observation"], projection)
        self._splits: dict[str, TableSplit] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_core, (self.config,)

    @property
    def observation_space(self) -> gym.Space:
        """Of one observation."""
        return self.observation.space

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

    def episodes(self, n: int) -> TableEpisodes:
        """A batch of ``n`` episodes."""
        return TableEpisodes(self, n)

    def masks_of(self, decisions: Array) -> Array:
        """The numbers, int64 ``[n]``, of the masks that decisions ``[n, components]`` are."""
        return decisions @ self._place if self.exhaustive else decisions[:, 0]

    def spelled(self, decisions: Array) -> Array:
        """Decisions ``[n, components]`` as masks, int64 ``[n, switches + 1]``."""
        return np.array(decisions, dtype=np.int64) if self.exhaustive else self.masks[decisions[:, 0]]

    def numbered(self, masks: Array) -> Array:
        """Masks ``[n, switches + 1]`` as decisions, int64 ``[n, components]``: the other way round.

        Raises:
            ValueError: If one is none of this table.
        """
        if self.exhaustive:
            return np.array(masks, dtype=np.int64)
        numbers = {tuple(mask): number for number, mask in enumerate(self.masks.tolist())}
        try:
            return np.array([numbers[tuple(mask)] for mask in np.asarray(masks).tolist()], dtype=np.int64)[:, None]
        except KeyError as error:
            raise ValueError(f"{self.folder} has no mask {list(error.args[0])}") from error

    def observe(self, split: TableSplit, rows: Array) -> Array:
        """What is seen of rows ``[n]`` of a split: new arrays, a row an instance."""
        return self.observation.observe(split, rows)

    def walk(self, split: TableSplit, rows: Array, decide: Callable[[Array], Array]) -> tuple[Array, None]:
        """Decide on rows; there is no pass for ``score`` to go on from."""
        return decide(self.observe(split, rows)), None

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


def _shared_split(config: EnvConfig, name: str) -> TableSplit:
    return table_core(config).split(name)


def number_of_decisions(nvec: Array) -> int:
    """How many there are."""
    return math.prod(int(size) for size in nvec)
