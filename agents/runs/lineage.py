"""The runs that a run started from, and the rows that they learned on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.runs.folder import STARTS, read_description

from sd_gym.config import stored_config
from sd_gym.tasks.backbone_rows import row_hashes
from sd_gym.tasks.data import Instances
from sd_gym.tasks.splits import Splits


def check_starts(settings: dict[str, Any], data: Any) -> None:
    """``check_not_learned`` for each run that an agent's ``settings`` start from."""
    for key in STARTS:
        folder = settings.get(key)
        if folder is not None and Path(folder, "config.json").is_file():
            check_not_learned(Path(folder), data, f"{key}={folder}")


def check_not_learned(folder: Path, data: Any, name: str) -> None:
    """Raise ``ValueError`` if a run learned on rows that it is selected or tested on.

    Rows are found by their texts where the data of the run can still be read, else only if they are the same split.

    Args:
        folder: The run; the runs that it started from count, too.
        data: The splits of an env, by name.
        name: Of the run, for the message.
    """
    train = data["train"].identity["hash"]
    own = row_hashes(data["train"]) if isinstance(data["train"], Instances) else []  # an env compares its own splits
    for run in _lineage(folder):
        learned = run["data"].get("train")
        if learned is None or learned["hash"] == train:
            continue
        hashes = np.setdiff1d(_learned_rows(run, learned["hash"]), own)
        for split in ("validation", "test"):
            rows = data[split]
            known = isinstance(rows, Instances) and np.isin(row_hashes(rows), hashes).any()
            if known or learned["hash"] == rows.identity["hash"]:
                raise ValueError(
                    f"{name}: this run learned on rows of this env's {split} split, so the guarantee would not hold; "
                    "take a run that learned on the training split"
                )


def _lineage(folder: Path) -> Iterator[dict[str, Any]]:
    """Descriptions of a run and of those that it started from, as far as their folders exist."""
    run = read_description(folder)
    yield run
    for key in STARTS:
        start = run["agent_settings"].get(key)
        if start is not None and Path(start, "config.json").is_file():
            yield from _lineage(Path(start))


def _learned_rows(run: dict[str, Any], expected: str) -> NDArray[np.int64]:
    """Hashes of the texts that a run learned on; none if its data are generated, a table, lost or changed."""
    none = np.empty(0, dtype=np.int64)
    try:
        config = stored_config(run["env_config"], "the run")
        if config.data.dataset == "procedural":  # its splits never share a text
            return none
        with warnings.catch_warnings(action="ignore"):
            rows = Splits.of_env(config)["train"]
    except (ValueError, OSError):
        return none
    return row_hashes(rows) if rows.identity["hash"] == expected else none
