"""The splits of a data set, compared with each other: texts in two of them are refused, dropped or counted."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

from sd_gym.config import SPLITS, DataConfig, EnvConfig
from sd_gym.errors import DataError
from sd_gym.tasks.backbone_rows import backbone_rows, row_hashes
from sd_gym.tasks.data import Instances, check_splits, load_split

BACKBONE = "the backbone's rows"  # in ``Instances.also_in``


class Splits:
    """The splits of a data set, all read on the first access to one of them.

    An error in a split is raised on access to that split, as learning needs no test split. Generated splits are
    disjoint, and each is generated on access. Policies learn on the rows of ``train`` that ``backbone`` (its name) was
    not prepared on, unless ``data.policy_rows`` is ``all``; ``None``: all rows. The splits ``unlabelled`` have no known
    references. Raises: see ``check_splits`` and ``backbone_rows``.
    """

    def __init__(
        self, data: DataConfig, task: str, backbone: str | None = None, *, unlabelled: Collection[str] = ()
    ) -> None:
        check_splits(data)
        self._data = data
        self._task = task
        self._unlabelled = unlabelled
        self._of_backbone = np.empty(0, dtype=np.int64) if backbone is None else backbone_rows(backbone)
        self._read: dict[str, Instances | Exception] = {}

    @classmethod
    def of_env(cls, config: EnvConfig) -> Splits:
        """The splits of an env, without its backbone's rows."""
        return cls(config.data, config.task, config.backbone.name, unlabelled=answered_densely(config))

    def __getitem__(self, name: str) -> Instances:
        """The instances of a split, by its name. Raises: see ``load_split``.

        If rows are in two splits, or among the backbone's: DataError (``overlap: error``) or a warning (``allow``).
        """
        if self._data.dataset == "procedural":
            if name not in self._read:
                self._read[name] = generated = self._load(name, {})
                if isinstance(generated, Instances):
                    self._take_out_backbone_rows({name: generated})
        elif not self._read:
            known: dict[str, tuple[str, list]] = {}
            read = {split: self._load(split, known) for split in SPLITS}
            splits = {split: rows for split, rows in read.items() if isinstance(rows, Instances)}
            self._take_out_backbone_rows(splits)
            if self._data.overlap != "drop":
                self._cut_train(splits)
            _compare(splits, self._data)
            self._cut_train(splits)
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

    def _take_out_backbone_rows(self, splits: dict[str, Instances]) -> None:
        """Leave out, count or refuse the backbone's rows: in ``train`` by ``policy_rows``, elsewhere by ``overlap``."""
        data = self._data
        for name, instances in splits.items() if len(self._of_backbone) else ():
            known = np.isin(row_hashes(instances), self._of_backbone)
            leave_out = data.policy_rows == "new" if name == "train" else data.overlap == "drop"
            if known.any() and not leave_out:
                words = f"{known.sum()} of the {len(known)} rows of {name} ({instances.part}) are rows of the backbone"
                if name != "train" and data.overlap == "error":
                    raise DataError(
                        f"{words}, which was prepared on them, so a result would be too good. Set overlap=drop to "
                        "leave them out, or overlap=allow to use them all the same"
                    )
                instances.also_in[BACKBONE] = int(known.sum())
                if name != "train":
                    warnings.warn(f"{words}, as overlap=allow says", stacklevel=4)
            elif leave_out:
                instances.of_backbone = int(known.sum())
                instances.keep(np.flatnonzero(~known).tolist())
                if not instances:
                    raise DataError(
                        f"the backbone was prepared on all {len(known)} rows of {name} ({instances.part}). Prepare it "
                        "on fewer (sd-gym prepare --rows 0.6), or set policy_rows=all to learn on them too"
                    )

    @property
    def _cuts_train_last(self) -> bool:
        """Whether ``train`` is cut to ``train_size`` after the backbone's rows have been left out."""
        of_data = self._data.dataset != "procedural" and self._data.policy_rows == "new"
        return of_data and len(self._of_backbone) > 0

    def _cut_train(self, splits: dict[str, Instances]) -> None:
        if self._cuts_train_last and "train" in splits:
            splits["train"].keep(range(len(splits["train"]))[: self._data.train_size])

    def _load(self, name: str, known: dict[str, tuple[str, list]]) -> Instances | Exception:
        cut_later = name == "train" and self._cuts_train_last
        data = self._data.model_copy(update={"train_size": None}) if cut_later else self._data
        try:
            return load_split(data, self._task, name, known, labelled=name not in self._unlabelled)
        except (FileNotFoundError, DataError) as error:
            return error


def answered_densely(config: EnvConfig) -> Collection[str]:
    """The splits of an env whose references are the dense answers."""
    if config.quality.kind == "agreement":
        return SPLITS
    return ("train",) if config.data.policy_labels == "dense" else ()


def check_unchanged(run: Path, before: Mapping[str, Mapping[str, Any]], data: Splits) -> None:
    """Raise ``DataError`` if splits have changed since a run (or preparation) began.

    ``before``: the earlier ``Instances.identity`` of some splits; empty: not known.
    """
    now = {name: data[name].identity for name in before}
    differ = [name for name, was in before.items() if was["hash"] != now[name]["hash"]]
    if differ:
        shown = "; ".join(f"{name} was {_in_words(before[name])}, and is {_in_words(now[name])}" for name in differ)
        raise DataError(f"{run}: the data have changed: {shown}. Begin again, or restore the former data")


def _in_words(identity: Mapping[str, Any]) -> str:
    return f"{identity['instances']} instances of {identity['file']} ({identity['part']}, hash {identity['hash']})"


def _compare(splits: dict[str, Instances], data: DataConfig) -> None:
    """Drop, refuse or count the texts that are in two splits, by ``data.overlap``."""
    hashes = {name: row_hashes(instances) for name, instances in splits.items()}
    shared = {pair: int(np.isin(hashes[pair[0]], hashes[pair[1]]).sum()) for pair in permutations(splits, 2)}
    if not any(shared.values()):
        return
    if data.overlap == "drop":  # rows stay in the last split that has them
        for name, instances in splits.items():
            later = [hashes[other] for other in splits if SPLITS.index(other) > SPLITS.index(name)]
            dropped = np.isin(hashes[name], np.concatenate([hashes[name][:0], *later]))
            instances.dropped = int(dropped.sum())
            instances.keep(np.flatnonzero(~dropped).tolist())
            if not instances:
                raise DataError(
                    f"the split {name!r} of {data.dataset!r} is empty: all its rows are also in a later split"
                )
        return
    words = "; ".join(
        f"{shared[name, other]} of the {len(splits[name])} rows of {name} ({splits[name].part}) are also in {other} "
        f"({splits[other].part})"
        for name, other in combinations(splits, 2)
        if shared[name, other]
    )
    if data.overlap == "error":
        raise DataError(
            f"splits of {data.dataset!r} overlap: {words} (the same texts, whatever their labels), so a result would "
            "be too good. Separate them with splits=..., or set overlap=drop to leave such rows out of the first "
            "split, or overlap=allow to use them all the same"
        )
    for (name, other), count in shared.items():
        if count:
            splits[name].also_in[other] = count
    warnings.warn(f"splits of {data.dataset!r} overlap, as overlap=allow says: {words}", stacklevel=4)
