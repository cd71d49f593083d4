"""The splits of a data set, compared: no text stands in two of them, or it is known which do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from sd_gym.config import DataConfig
from sd_gym.data.instance import Instance
from sd_gym.tasks.data import SPLITS, DataError, Instances, check_splits, load_split


class Splits:
    """The splits of a data set, all of them read when the first one is asked for.

    An error in a split is raised when that split is asked for, as learning needs no test split. Generated splits are
    disjoint; each is generated when it is asked for. Raises: see ``check_splits``.
    """

    def __init__(self, data: DataConfig, task: str) -> None:
        check_splits(data)
        self._data, self._task = data, task
        self._read: dict[str, Instances | Exception] = {}

    def __getitem__(self, name: str) -> Instances:
        """The instances of a split, by its name. Raises: see ``load_split``.

        Where rows stand in two splits, DataError (``overlap: error``) or a warning (``overlap: allow``).
        """
        if self._data.dataset == "procedural":
            if name not in self._read:
                self._read[name] = self._try(name, {})
        elif not self._read:
            known: dict[str, tuple[str, list]] = {}
            read = {split: self._try(split, known) for split in SPLITS}
            _compare({split: rows for split, rows in read.items() if isinstance(rows, Instances)}, self._data)
            self._read = read
        instances = self._read[name]
        if isinstance(instances, Exception):
            raise instances
        return instances

    def __contains__(self, name: str) -> bool:
        """Whether the data set has a split; an error in it is raised."""
        try:
            return len(self[name]) > 0
        except FileNotFoundError:
            return False

    def identity(self) -> dict[str, dict[str, Any]]:
        """``Instances.identity`` of each split; an error in one is raised."""
        return {name: self[name].identity for name in SPLITS}

    def _try(self, name: str, known: dict[str, tuple[str, list]]) -> Instances | Exception:
        try:
            return load_split(self._data, self._task, name, known)
        except (FileNotFoundError, DataError) as error:
            return error


def check_unchanged(run: Path, before: Mapping[str, Mapping[str, Any]], data: Splits) -> None:
    """Raise ``DataError``, naming the splits, if they are not what they were when the run (or preparation) began.

    ``before``: ``Splits.identity`` of some splits then; empty: not known.
    """
    now = {name: data[name].identity for name in before}
    differ = [name for name, was in before.items() if was["hash"] != now[name]["hash"]]
    if differ:
        shown = "; ".join(f"{name} was {_words(before[name])}, and is {_words(now[name])}" for name in differ)
        raise DataError(f"{run}: the data have changed: {shown}. Begin again, or bring back those that were there")


def _words(identity: Mapping[str, Any]) -> str:
    return f"{identity['instances']} instances of {identity['file']} ({identity['part']}, hash {identity['hash']})"


def _key(instance: Instance) -> tuple[str, str | None]:
    return instance.source.strip(), instance.source_pair and instance.source_pair.strip()


def _compare(splits: dict[str, Instances], data: DataConfig) -> None:
    """Drop, refuse or count the texts that stand in two splits, as ``data.overlap`` says."""
    texts = {name: {_key(instance) for instance in instances} for name, instances in splits.items()}
    shared = {
        (name, other): sum(_key(instance) in texts[other] for instance in splits[name])
        for name, other in combinations(splits, 2)
        if texts[name] & texts[other]
    }
    if not shared:
        return
    if data.overlap == "drop":
        for name in splits:
            later = [texts[other] for other in splits if SPLITS.index(other) > SPLITS.index(name)]
            _drop(splits[name], set().union(*later), f"the split {name!r} of {data.dataset!r}")
        return
    words = "; ".join(
        f"{count} of the {len(splits[name])} rows of {name} ({splits[name].part}) also stand in {other} "
        f"({splits[other].part})"
        for (name, other), count in shared.items()
    )
    if data.overlap == "error":
        raise DataError(
            f"splits of {data.dataset!r} overlap: {words} (the same texts, whatever their labels). A result would be "
            "of rows that were learned from. Cut them apart with splits=..., or set overlap=drop to leave such rows "
            "out of the first one, or overlap=allow to go on all the same"
        )
    for pair in shared:
        for name, other in (pair, pair[::-1]):
            splits[name].also_in[other] = sum(_key(instance) in texts[other] for instance in splits[name])
    warnings.warn(f"splits of {data.dataset!r} overlap, as overlap=allow says: {words}", stacklevel=4)


def _drop(instances: Instances, texts: set[tuple[str, str | None]], what: str) -> None:
    """Leave out, in place, what stands among ``texts``."""
    kept = [number for number, instance in enumerate(instances) if _key(instance) not in texts]
    instances.dropped = len(instances) - len(kept)
    instances.rows = [instances.rows[number] for number in kept]
    instances[:] = [instances[number] for number in kept]
    if not kept:
        raise DataError(f"{what} is empty: all its rows also stand in a later split")
