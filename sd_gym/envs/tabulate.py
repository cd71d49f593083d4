"""Make a table: run every instance of an env under every decision of a set."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray as Array

from sd_gym import cluster
from sd_gym.config import SPLITS, ConfigError
from sd_gym.envs.actions import all_decisions, read_masks, write_masks
from sd_gym.envs.export import Export
from sd_gym.envs.packing import merged, packed_costs, packed_qualities, smallest
from sd_gym.envs.protocols import Core, mean_flops
from sd_gym.envs.staged import BackboneStageObserver
from sd_gym.envs.table_files import CODEBOOK, FACT, FORMAT, JUDGED, PROJECTION, READ, SPENT, observations_at
from sd_gym.execution.split import BackboneSplit
from sd_gym.files import as_json, map_arrays, read_json, write_arrays, write_json
from sd_gym.folders import MARKER, contents, locked, other_content_error
from sd_gym.objectives import OBJECTIVES
from sd_gym.projection import OBSERVATION_LIMIT, Projection, fit_projection, read_projection
from sd_gym.version import __version__

CHUNK = 256  # instances per file of outcomes
ORDER_ROWS = 256  # training instances whose mean FLOPs order the masks
PARTS = "parts"
DENSE_LOSS = "dense_loss"
NUMBERS = "biuf"  # kinds of numeric arrays


class Units(NamedTuple):
    """What a table's env decides on, if not on switches or the index of a mask: such as whole layers."""

    names: list[str]  # names of the units, without the last one, the token level
    sizes: list[int]  # choices of each unit
    order: list[int]  # mask index of each combination of choices; the last unit's choice changes first


def by_falling_flops(core: Core[BackboneSplit], masks: Array) -> Array:
    """Order of masks ``[masks, switches + 1]`` from most to fewest FLOPs, the dense one first: int64 ``[masks]``."""
    split = core.split("train")
    rows = np.arange(min(len(split), ORDER_ROWS))
    order = np.argsort(-mean_flops(split, rows, masks), kind="stable")
    is_dense = ~masks[order].any(axis=1)  # ranking tokens can cost more than dropping them saves
    return np.concatenate([order[is_dense], order[~is_dense]])


class _Chunk(NamedTuple):
    """Instances whose outcomes are written to one file."""

    split: str
    rows: Array
    file: Path


@dataclass(frozen=True)
class TableMaker:
    """Runs all instances of an env under decisions and writes the outcomes.

    Each chunk of instances is written when it is done, and a resumed table continues with the next one. It becomes the
    same, bit for bit, with the same number of threads.
    """

    core: Core[BackboneSplit]
    masks: Array | None  # ``[masks, switches + 1]``, all different, the dense one first; ``None``: all
    folder: Path
    # With several stages, how many choices of each are in the masks. These are all combinations of the choices; the
    # choice of the last stage changes first.
    ways: list[int] | None
    units: Units | None  # what the table's env decides on, if not on switches or the index of a mask
    chosen: str  # how the masks were chosen, in words; empty: all
    pca: int | None  # how many numbers observations are reduced to; ``None``: not reduced
    share: bool  # whether ids, texts and paths are left out
    bf16: bool  # whether the backbone runs in mixed precision

    def make(
        self,
        *,
        resume: bool,
        jobs: int,
        imports: Sequence[str],
        on_chunk: Callable[[int, int], None],
        ray: str | None = None,
    ) -> None:
        """Make the table.

        Args:
            resume: Whether to continue an interrupted table.
            jobs: Number of processes.
            imports: Modules or files that worker processes import first.
            on_chunk: Called after each chunk with the number of outcomes so far, and of all.
            ray: Address of a Ray cluster that runs the chunks instead; it sees the folder under the same path.

        Raises:
            FileExistsError: If the folder is not empty, and does not hold a table that is resumed.
            ValueError: If that table is another one, or ``pca`` is too large.
            ConfigError: If the env's observation is not a ``Box``.
        """
        self._check()
        with locked(self.folder):
            core = self.core
            folder = self.folder
            exported = self.core.export()
            description = self._description(exported)
            if self._begin(description, resume):
                return
            masks = all_decisions(core.mask_nvec) if self.masks is None else self.masks
            chunks = [chunk for name in SPLITS for chunk in self._chunks(core.split(name))]
            missing = [chunk for chunk in chunks if not chunk.file.exists()]
            total, left = (len(masks) * sum(len(chunk.rows) for chunk in some) for some in (chunks, missing))
            on_chunk(total - left, total)
            reduce = self._projection()
            for chunk in _write_chunks((core, masks, self.ways or [], self.bf16, reduce), missing, jobs, ray, imports):
                left -= len(masks) * len(chunk.rows)
                on_chunk(total - left, total)
            for name in SPLITS:
                if not (folder / f"{name}.json").exists():
                    parts = [map_arrays(chunk.file) for chunk in chunks if chunk.split == name]
                    self._write_split(core.split(name), parts, masks, reduce)
            if exported is not None:
                exported.write(folder)
            write_json(folder / "table.json", {**description, "complete": True})
            shutil.rmtree(folder / PARTS)

    def _check(self) -> None:
        core = self.core
        space = self.core.observation_space
        pca = self.pca
        if not isinstance(space, gym.spaces.Box):
            raise ConfigError(
                f"{core.config.id}: the observations of a table are one array, such as observation=pooled; got "
                f"{core.config.observation} with the space {space}"
            )
        instances = len(core.split("train"))
        features = (min(space.shape) - sum(self._around),) if len(space.shape) == 1 else space.shape
        if pca is not None and (len(space.shape) != 1 or not 1 <= pca <= min(instances, *features)):
            raise ValueError(
                f"--pca: expected at least 1 component, and no more than there are training instances ({instances}) or "
                f"numbers to reduce in an observation (of shape {features}); got {pca}"
            )

    @property
    def _around(self) -> tuple[int, int]:
        """Sizes of the parts of an observation before and after the hidden states, which alone are reduced."""
        return (0, 0) if self.ways is None else cast("BackboneStageObserver", self.core.stage_observer).around

    def _chunks(self, split: BackboneSplit) -> list[_Chunk]:
        order = np.argsort(split.encoded.source_length, kind="stable")
        parts = enumerate(np.split(order, range(CHUNK, len(order), CHUNK)))
        folder = self.folder / PARTS
        return [_Chunk(split.name, rows, folder / f"{split.name}-{number:05}.safetensors") for number, rows in parts]

    def _projection(self) -> Projection | None:
        """How observations are reduced; written to the folder, or read from it if the table is resumed."""
        if self.pca is None:
            return None
        file = self.folder / PROJECTION
        if not file.exists():
            train, stages = self.core.split("train"), cast("BackboneStageObserver", self.core.stage_observer)
            observe = self.core.observe if self.ways is None else stages.dense
            observed = np.asarray(observe(train, np.arange(len(train))))
            fit_projection(observed, self.pca, *self._around).save(file)
        return read_projection(file)

    def _description(self, exported: Export | None) -> dict[str, Any]:
        core = self.core
        masks = self.masks
        ways = self.ways
        config = core.config.model_dump()
        is_numbered = masks is not None and ways is None and self.units is None
        config["action"], config["codebook"] = "discrete" if is_numbered else "multi_discrete", None
        config["backbone"]["device"] = "cpu"
        if config["reward"]["objective"] not in OBJECTIVES.built_in():
            config["reward"]["objective"] = "lexicographic"  # a registered one may be unknown elsewhere
        space: Any = core.observation_space
        if self.pca is not None:
            size = self.pca + sum(self._around)
            space = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, (size,), np.float32)
        splits = {
            split.name: {
                "instances": len(split),
                "identity": split.instances.identity,
                "provenance": split.provenance,
            }
            for split in map(core.split, SPLITS)
        }
        described = {
            MARKER: __version__,
            "format": FORMAT,
            "complete": False,
            "env": core.config.id,
            "chosen": self.chosen,
            "masks": None if masks is None else len(masks),
            "nvec": core.mask_nvec.tolist(),
            "backbone": {
                "name": core.config.backbone.name,
                "weights": core.backbone.weights,
                **(exported.backbone if exported else {}),
                "switches": core.backbone.board.names,
            },
            "protection": exported and exported.protection and exported.protection._asdict(),
            "context": exported and exported.context and exported.context._asdict(),
            "observation": {"shape": list(space.shape), "low": _bound(space.low), "high": _bound(space.high)},
            "pca": self.pca,
            "precision": "bf16" if self.bf16 else "fp32",
            "env_config": config,
            "splits": splits,
        }
        if ways is not None and masks is not None:
            described |= {"stages": core.stages, "ways": ways, "judges": core.stage_observer.judgements}
            if core.has_answer_stage:
                described["resume_points"] = core.split("train").costs.resume_points
                described["judgement"] = list(core.backbone.head.judgement)
        if self.units is not None:
            described["units"] = self.units._asdict()
        return _without_paths({**described, "share": True}) if self.share else described

    def _begin(self, description: dict[str, Any], resume: bool) -> bool:
        """Begin the folder, or check that it holds this table; returns whether the table is complete."""
        folder, masks = self.folder, self.masks
        file, codebook = folder / "table.json", folder / CODEBOOK
        if not contents(folder):
            write_json(file, description)
            if masks is not None:
                write_masks(masks, codebook)
            return False
        if not file.is_file():
            raise other_content_error(folder, "table")
        existing = read_json(file)
        complete = bool(existing.pop("complete", False))
        what = "a table" if complete else "an interrupted table"
        if not resume:
            raise FileExistsError(f"{folder} holds {what}; pass --resume, or choose another --output")
        wanted = {key: value for key, value in json.loads(as_json(description)).items() if key != "complete"}
        differ = [key for key in wanted if wanted[key] != existing.get(key)]
        if masks is not None and not differ:
            if contents(folder) == [file.name]:  # it was cut off before its masks were written
                write_masks(masks, codebook)
            if not np.array_equal(read_masks(codebook, self.core.mask_nvec), masks):
                differ = ["masks"]
        if differ:
            raise ValueError(f"{folder} holds {what} with another {', '.join(differ)}; choose another --output")
        if complete:
            shutil.rmtree(folder / PARTS, ignore_errors=True)
        return complete

    def _write_split(
        self, split: BackboneSplit, parts: list[dict[str, Array]], masks: Array, reduce: Projection | None
    ) -> None:
        core = self.core
        n = len(split)
        encoded = split.encoded
        undecided = np.zeros((CHUNK, len(core.nvec)), dtype=np.int64)
        observed = np.concatenate(
            [
                np.asarray(core.stage_observer.observe(split, rows, 0, undecided[: len(rows)], None)[0])
                for rows in np.split(np.arange(n), range(CHUNK, n, CHUNK))
            ]
        )
        split.dense_loss = merged(parts, DENSE_LOSS, n)
        facts = split.facts()
        numbers = {name: values for name, values in facts.items() if values.dtype.kind in NUMBERS}
        packed = {
            "difficulty": split.difficulty,
            "levels": split.levels,
            "source_length": encoded.source_length,
            "source_cut": encoded.source_cut,
            "target_cut": encoded.target_cut,
            **{FACT + name: values for name, values in numbers.items()},
        }
        whole = [*map(observations_at, range(1, len(self.ways or [0]))), *[JUDGED] * core.has_answer_stage]
        costs = packed_costs(*split.costs.by_level())
        dtype = _observation_dtype(reduce)
        spent = {}
        if core.has_answer_stage:  # the share of the dense FLOPs there, of each different cost under each mask
            rows = np.unique(costs["costs"], return_index=True)[1]
            shares = [split.costs.reading_ratio(rows, np.tile(mask, (len(rows), 1))) for mask in masks]
            spent[SPENT] = np.stack(shares, axis=1).astype(dtype)
            read, last = split.costs.read_flops(rows), split.costs.resume_points[-1]
            if (read[:, :last] != costs["switched"][:, 0, :last]).any():  # they run again on what is generated
                spent[READ] = read
        arrays = {
            "observations": (observed if reduce is None else reduce(observed)).astype(dtype),
            **packed_qualities(parts, n, len(masks)),
            **costs,
            **spent,
            **{name: merged(parts, name, n) for name in whole},
            **{name: smallest(values) for name, values in packed.items()},
        }
        write_arrays(self.folder / f"{split.name}.safetensors", arrays)
        ids = [f"{split.name}-{row}" for row in range(n)] if self.share else split.ids.tolist()
        texts = {} if self.share else {name: values.tolist() for name, values in facts.items() if name not in numbers}
        write_json(self.folder / f"{split.name}.json", {"ids": ids, "facts": texts})


def _write_chunks(
    arguments: tuple[Any, ...], chunks: list[_Chunk], jobs: int, ray: str | None, imports: Sequence[str]
) -> Iterator[_Chunk]:
    """Write chunks and yield each; ``arguments`` are the further ones of ``_write_chunk``."""
    calls = [(chunk, *arguments) for chunk in chunks]
    if ray is not None:
        yield from cluster.in_any_order(cluster.connect(ray), _write_chunk, calls, imports)
    elif min(jobs, len(chunks)) <= 1:
        yield from starmap(_write_chunk, calls)
    else:
        context = get_context("spawn")
        workers_end, own_end = context.Pipe(duplex=False)
        with ProcessPoolExecutor(jobs, context, cluster.prepare_worker, (list(imports), workers_end)) as pool:
            try:
                with cluster.without_interrupts():
                    futures = [pool.submit(_write_chunk, *call) for call in calls]
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:  # Ctrl-C, too
                own_end.close()  # the workers end at once: a chunk may take minutes, and is written whole or not at all
                raise


def _write_chunk(
    chunk: _Chunk, core: Core[BackboneSplit], masks: Array, ways: list[int], bf16: bool, reduce: Projection | None
) -> _Chunk:
    split = core.split(chunk.split)
    rows = chunk.rows
    arrays = dict[str, Array]()
    # Another process may run this, so it sets the precision itself.
    with torch.autocast(core.backbone.model.device.type, torch.bfloat16, enabled=bf16):
        if core.has_answer_stage:
            quality, judged = split.scoring.judged_under_all(rows, masks)
            arrays[JUDGED] = np.clip(judged, -OBSERVATION_LIMIT, OBSERVATION_LIMIT).astype(_observation_dtype(reduce))
        else:
            quality, _ = split.scoring.under_all(rows, masks)
        arrays |= {"rows": rows, "quality": smallest(quality)}
        for stage in range(1, len(ways)):
            observed = []
            for mask in masks[:: math.prod(ways[stage:])]:  # one mask per combination of the earlier stages' choices
                decisions = np.tile(mask, (len(rows), 1))
                values = np.asarray(core.stage_observer.observe(split, rows, stage, decisions, None)[0])
                observed.append(values if reduce is None else reduce(values))
            arrays[observations_at(stage)] = np.stack(observed, axis=1).astype(_observation_dtype(reduce))
    write_arrays(chunk.file, {**arrays, DENSE_LOSS: split.dense_loss_of(rows)})
    return chunk


def _observation_dtype(reduce: Projection | None) -> type:
    return np.float32 if reduce is None else np.float16  # reduced observations are rounded


def _without_paths(value: Any) -> Any:
    """The value with each path of this machine replaced by the name of the file or folder."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, str) or os.sep not in value:
        return value
    path, comma, more = value.partition(", ")  # a copy of a hub data set, and its subset
    return value if not Path(path).exists() else Path(path).name + comma + more


def _bound(values: Array) -> Any:
    """A bound of a space as a list, or one number if all are equal."""
    return values.flat[0].item() if (values == values.flat[0]).all() else values.tolist()
