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

    What is wrong with a split is told when that split is asked for: who only learns needs no test split. Generated
    splits are disjoint as they are made, and each is generated when it is asked for.

    Args:
        data: The data set.
        task: As for ``load_split``.

    Raises:
        DataError: If what ``data`` says of its splits cannot be.
    """

    def __init__(self, data: DataConfig, task: str) -> None:
        check_splits(data)
        self._data = data
        self._task = task
        self._read: dict[str, Instances | Exception] = {}

    def __getitem__(self, name: str) -> Instances:
        """The instances of a split, by its name.

        Raises:
            FileNotFoundError, DataError: As ``load_split`` raises; and if rows stand in two splits whose ``DataConfig``
                does not say what is done about that.

        Warns:
            UserWarning: If they do and are allowed to.
        """
        if self._data.dataset == "procedural":
            if name not in self._read:
                self._read[name] = self._try(name, {})
        elif not self._read:
            known: dict[str, tuple[str, list]] = {}
            read = {split: self._try(split, known) for split in SPLITS}
            _compare({split: one for split, one in read.items() if isinstance(one, Instances)}, self._data)
            self._read = read
        found = self._read[name]
        if isinstance(found, Exception):
            raise found
        return found

    def __contains__(self, name: str) -> bool:
        """Whether the data set has a split; raises as asking for it does, but where there is none."""
        try:
            return len(self[name]) > 0
        except FileNotFoundError:
            return False

    def identity(self) -> dict[str, dict[str, Any]]:
        """``Instances.identity`` of each split; raises as asking for each does."""
        return {name: self[name].identity for name in SPLITS}

    def _try(self, name: str, known: dict[str, tuple[str, list]]) -> Instances | Exception:
        try:
            return load_split(self._data, self._task, name, known)
        except (FileNotFoundError, DataError) as error:
            return error


def check_unchanged(run: Path, before: Mapping[str, Mapping[str, Any]], data: Splits) -> None:
    """Raise ``DataError``, naming the splits, if they are not what they were.

    Args:
        run: The folder of a run, or of a preparation.
        before: What ``Splits.identity`` said of some splits when it began; empty: nobody knows.
        data: The splits now.
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
    """Do what ``data.overlap`` says about the texts that stand in two splits."""
    texts = {name: {_key(one) for one in instances} for name, instances in splits.items()}
    shared = {
        (one, other): sum(_key(instance) in texts[other] for instance in splits[one])
        for one, other in combinations(splits, 2)
        if texts[one] & texts[other]
    }
    if not shared:
        return
    if data.overlap == "drop":
        for name in splits:
            later = [texts[other] for other in splits if SPLITS.index(other) > SPLITS.index(name)]
            _drop(splits[name], set().union(*later), f"the split {name!r} of {data.dataset!r}")
        return
    words = "; ".join(
        f"{count} of the {len(splits[one])} rows of {one} ({splits[one].part}) also stand in {other} "
        f"({splits[other].part})"
        for (one, other), count in shared.items()
    )
    if data.overlap == "error":
        raise DataError(
            f"splits of {data.dataset!r} overlap: {words} (the same texts, whatever their labels). A result would be "
            "of rows that were learned from. Cut them apart with splits=..., or set overlap=drop to leave such rows "
            "out of the first one, or overlap=allow to go on all the same"
        )
    for one, other in shared:
        for name, against in ((one, other), (other, one)):
            splits[name].also_in[against] = sum(_key(instance) in texts[against] for instance in splits[name])
    warnings.warn(f"splits of {data.dataset!r} overlap, as overlap=allow says: {words}", stacklevel=4)


def _drop(instances: Instances, texts: set[tuple[str, str | None]], what: str) -> None:
    """Leave out, in place, what stands among ``texts``."""
    kept = [number for number, one in enumerate(instances) if _key(one) not in texts]
    instances.dropped = len(instances) - len(kept)
    instances.rows = [instances.rows[number] for number in kept]
    instances[:] = [instances[number] for number in kept]
    if not kept:
        raise DataError(f"{what} is empty: all its rows also stand in a later split")
