"""Making a table: every decision of a set on every instance of an env, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.config import ConfigError
from sd_gym.envs.core import Core
from sd_gym.envs.spaces import write_masks
from sd_gym.envs.split import Split
from sd_gym.envs.table import FACT, FORMAT, all_decisions
from sd_gym.files import as_json, map_arrays, read_json, write_arrays, write_json
from sd_gym.folders import MARKER, contents, foreign, locked
from sd_gym.objectives import OBJECTIVES
from sd_gym.tasks.data import SPLITS
from sd_gym.version import __version__

Array = NDArray
CHUNK = 256  # instances that are run under all masks before anything is written
PARTS = "parts"
OnChunk = Callable[[int, int], None]  # called with the decisions that are done, and all there are


def write_table(
    core: Core, masks: Array | None, folder: Path, *, chosen: str = "", resume: bool = False, on_chunk: OnChunk
) -> None:
    """Run all instances of an env under decisions and write what comes of it.

    Each chunk of instances is written when it is done, so that a table which was cut off goes on with the next one; it
    becomes the same, bit for bit.

    Args:
        core: The env's core.
        masks: The decisions, ``[masks, switches + 1]``, the dense one first and no two alike; ``None``: all.
        folder: Where to write it; see ``sd_gym.envs.table``.
        chosen: How the masks were chosen, in words.
        resume: Whether to go on with the folder's table, if one is begun there.
        on_chunk: Called after each chunk.

    Raises:
        FileExistsError: If the folder holds a table, one that was cut off and shall not be resumed, or anything else.
        ValueError: If what was cut off is another table.
        ConfigError: If the env decides at several stages, or its observation is no ``Box``.
    """
    _check(core)
    with locked(folder):
        description = _description(core, masks, chosen)
        _begin(folder, description, masks, resume)
        numbers = all_decisions(core.nvec) if masks is None else masks
        done, total = 0, sum(len(core.split(name)) for name in SPLITS) * len(numbers)
        for name in SPLITS:
            split = core.split(name)
            files = []
            for number, rows in enumerate(_chunks(split)):
                files.append(folder / PARTS / f"{name}-{number:05}.safetensors")
                if not files[-1].exists():
                    quality, likelihood = split.scoring.under_all(rows, numbers)
                    part = {"rows": rows, "quality": quality, "likelihood": likelihood.astype(np.float16)}
                    write_arrays(files[-1], part)
                done += len(rows) * len(numbers)
                on_chunk(done, total)
            _write_split(core, split, files, len(numbers), folder)
        write_json(folder / "table.json", {**description, "complete": True})
        shutil.rmtree(folder / PARTS)


def _check(core: Core) -> None:
    if core.is_staged:
        raise ConfigError(
            f"{core.config.id}: a table has decisions of one stage, but the stages are {core.stages}; leave them out"
        )
    if not isinstance(core.observation_space, gym.spaces.Box):
        raise ConfigError(
            f"{core.config.id}: a table has observations that are one array, such as observation=pooled; got "
            f"{core.config.observation} with the space {core.observation_space}"
        )


def _chunks(split: Split) -> list[Array]:
    """Rows of about the same length, which waste little on padding."""
    order = np.argsort(split.encoded.source_length, kind="stable")
    return np.split(order, range(CHUNK, len(order), CHUNK))


def _description(core: Core, masks: Array | None, chosen: str) -> dict[str, Any]:
    config = core.config.model_dump()
    config["action"], config["codebook"], config["device"] = (
        "multi_discrete" if masks is None else "discrete",
        None,
        "cpu",
    )
    if config["objective"] not in OBJECTIVES.built_in():  # one of the user's own may not be registered elsewhere
        config["objective"] = "lexicographic"
    space = core.observation_space
    splits = {}
    for name in SPLITS:
        split = core.split(name)
        splits[name] = {
            "instances": len(split),
            "identity": split.instances.identity,
            "provenance": split.provenance,
            "facts": list(split.facts()),
        }
    return {
        MARKER: __version__,
        "format": FORMAT,
        "complete": False,
        "env": core.config.id,
        "chosen": chosen,
        "masks": None if masks is None else len(masks),
        "nvec": core.nvec.tolist(),
        "backbone": {
            "name": core.config.backbone,
            "weights": core.backbone.weights,
            "switches": core.backbone.board.names,
        },
        "observation": {"shape": list(space.shape), "low": _bound(space.low), "high": _bound(space.high)},
        "env_config": config,
        "splits": splits,
    }


def _bound(values: Array) -> Any:
    """A bound of a space; one number if it is the same everywhere."""
    return values.flat[0].item() if (values == values.flat[0]).all() else values.tolist()


def _begin(folder: Path, description: dict[str, Any], masks: Array | None, resume: bool) -> None:
    """Make the folder ready, or find in it the table that is to go on."""
    file, codebook = folder / "table.json", folder / "codebook.json"
    if not contents(folder):
        if masks is not None:
            write_masks(masks, codebook)
        write_json(file, description)
        return
    if not file.is_file():
        raise foreign(folder, "table")
    there = read_json(file)
    if there.get("complete"):
        raise FileExistsError(f"{folder} holds a table; choose another --output")
    if not resume:
        raise FileExistsError(f"{folder} holds a table that was cut off; go on with --resume, or take another --output")
    here = json.loads(as_json(description))
    differ = [key for key in here if here[key] != there.get(key)]
    if masks is not None and not differ and json.loads(codebook.read_text(encoding="utf-8")) != masks.tolist():
        differ = ["masks"]
    if differ:
        raise ValueError(
            f"{folder} holds the beginning of another table: another {', '.join(differ)}; choose another --output"
        )


def _write_split(core: Core, split: Split, files: list[Path], masks: int, folder: Path) -> None:
    """Put the chunks of a split together, with all that is known of its instances."""
    if (folder / f"{split.name}.json").exists():
        return
    codes, values = _codes([map_arrays(file) for file in files], len(split), masks)
    likelihood = np.empty((len(split), masks), dtype=np.float16)
    for part in map(map_arrays, files):
        likelihood[part["rows"]] = part["likelihood"]
    always, switched = split.costs.by_level()
    facts = split.facts()
    numbers = {name: values for name, values in facts.items() if values.dtype.kind in "biuf"}
    arrays = {
        "quality": codes,
        "likelihood": likelihood,
        "always": always,
        "switched": switched,
        "observations": np.asarray(core.observe(split, np.arange(len(split))), dtype=np.float32),
        "difficulty": np.asarray(split.difficulty, dtype=np.int64),
        "levels": np.asarray(split.levels, dtype=np.int64),
        "source_length": np.asarray(split.encoded.source_length, dtype=np.int64),
        "source_cut": np.asarray(split.encoded.source_cut, dtype=np.bool_),
        "target_cut": np.asarray(split.encoded.target_cut, dtype=np.bool_),
    }
    if values is not None:
        arrays["quality_values"] = values
    for name, known in numbers.items():
        kind = {"b": np.bool_, "f": np.float64}.get(known.dtype.kind, np.int64)
        arrays[FACT + name] = known.astype(kind)
    write_arrays(folder / f"{split.name}.safetensors", arrays)
    words = {name: known.tolist() for name, known in facts.items() if name not in numbers}
    write_json(folder / f"{split.name}.json", {"ids": split.ids.tolist(), "facts": words})


def _codes(parts: list[dict[str, Array]], n: int, masks: int) -> tuple[Array, Array | None]:
    """Qualities ``[n, masks]`` as numbers of the values that occur, and these; of too many, as they are, float32."""
    values = np.unique(np.concatenate([np.unique(part["quality"]) for part in parts]))
    kind = np.uint8 if len(values) <= 2**8 else np.uint16 if len(values) <= 2**16 else np.float32
    found = np.empty((n, masks), dtype=kind)
    for part in parts:
        quality = part["quality"]
        found[part["rows"]] = quality if kind is np.float32 else np.searchsorted(values, quality)
    return found, None if kind is np.float32 else values
