"""Data sets as lists of instances: generated, from JSONL, CSV or Parquet files, or from the Hugging Face hub."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sd_gym.config import SPLITS, DataConfig
from sd_gym.data.instance import Instance, NamedClass
from sd_gym.errors import DataError, one_line, short
from sd_gym.registry import nearest
from sd_gym.tasks.family import LARGEST, TASKS, Task, check_text, is_number
from sd_gym.tasks.files import Rows, read_csv, read_jsonl
from sd_gym.tasks.procedural import generate_split

DIVISION = {8: "validation", 9: "test"}  # the split of a row of a single file, by the last digit of its number
FORMATS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class Instances(list[Instance]):
    """The instances of a split, from a ``part`` (``train[0:30]``, empty rows included) of a file or hub data set."""

    def __init__(self, instances: Iterable[Instance] = (), *, file: str = "", part: str = "") -> None:
        super().__init__(instances)
        self.file = file
        self.part = part
        self.rows: list[int] = list(range(len(self)))  # their row numbers in the file, from 0
        self.left_out = 0  # rows left out because a needed text is empty
        self.dropped = 0  # rows left out because they are also in another split (overlap: drop)
        self.of_backbone = 0  # rows left out because the backbone was prepared on them
        self.also_in: dict[str, int] = {}  # rows also in another split (overlap: allow) or the backbone's, by its name

    def keep(self, positions: Sequence[int]) -> None:
        """Leave out, in place, all but the instances at some positions."""
        self.rows = [self.rows[position] for position in positions]
        self[:] = [self[position] for position in positions]
        vars(self).pop("hash", None)  # it is out of date

    @cached_property
    def hash(self) -> str:
        """A hash of the instances in order, without their ids and origins."""
        digest = hashlib.blake2b(digest_size=8)
        keys = ("source", "source_pair", "target", "difficulty", "protected", "more_targets", "answer_spans")
        for instance in self:
            digest.update(repr(tuple(getattr(instance, key) for key in keys)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """Which rows these are, for ``config.json``: ``file``, ``part``, ``instances`` and ``hash``."""
        return {"file": self.file, "part": self.part, "instances": len(self), "hash": self.hash}

    @property
    def provenance(self) -> dict[str, Any]:
        """``identity``, and how many rows were left out or are in other splits too, for ``result.json``."""
        counts = {key: getattr(self, key) for key in ("left_out", "dropped", "of_backbone", "also_in")}
        return {**self.identity, **counts}


def check_splits(data: DataConfig) -> None:
    """Raise ``DataError`` if the config's ``splits`` are malformed."""
    for name, expression in data.splits:
        if name not in SPLITS:
            raise DataError(f"'splits': unknown split {name!r}{nearest(name, SPLITS)} There are {', '.join(SPLITS)}.")
        try:
            _slice(expression)
        except DataError as error:
            raise DataError(f"'splits': {error}") from None
    if data.splits and data.dataset == "procedural":
        raise DataError("'splits': the procedural data set has its own splits; leave the key out")


def load_split(
    data: DataConfig | str,
    task: str,
    split: str,
    known: dict[str, tuple[str, list]] | None = None,
    *,
    labelled: bool = True,
) -> Instances:
    """The instances of one split, in the data set's order; ``Splits`` also compares the splits with each other.

    A row is left out and counted if a needed text is empty. A single file is divided by row: every tenth row is
    validation, every tenth test, the rest train. If the config has ``splits``, the whole file is ``train``. ``data``
    can be its ``dataset`` alone. ``known`` caches the data set's own splits between calls. If not ``labelled``, rows
    need no references.

    Raises:
        FileNotFoundError: If the file, folder, split or hub id does not exist.
        DataError: If the data set is empty or a row is malformed.
    """
    data = DataConfig(dataset=data) if isinstance(data, str) else data
    check_splits(data)
    size, family = data.size(split), TASKS.find(task)
    if data.dataset == "procedural":
        if size is None:
            raise DataError(f"the procedural data set is endless; set {split}_size")
        return Instances(generate_split(task, split, size), file="procedural", part=f"{split}[0:{size}]")
    divided = Path(data.dataset).is_file() and not data.splits
    named = dict(data.splits)
    base, start, end = _slice(named.get(split, "train" if divided else split))
    known = {} if known is None else known
    if base not in known:
        file, lines = _read(data, base, split)
        known[base] = file, list(lines)
    file, rows = known[base]
    _check_columns(data, family, task, file, rows)
    taken = set() if split in named else _named_rows(data, base, len(rows))
    chosen = [row for row in range(len(rows))[start:end] if row not in taken]
    if divided:
        chosen = [row for row in chosen if DIVISION.get(row % 10, "train") == split]
    chosen = chosen[:size]
    instances = Instances(file=file, part=_described(base, chosen, len(rows)))
    for number, position in enumerate(chosen):
        origin, row = rows[position]
        fields = _fields(row, data, family, task, origin, labelled)
        if fields is None:
            instances.left_out += 1
            continue
        unanswerable = data.unanswerable or not labelled  # the answer is not known yet
        options = {"difficulty": _difficulty(fields.get("difficulty"), origin), "unanswerable": unanswerable}
        instances.append(family.instance(fields, f"{split}-{number}", origin, **options))
        instances.rows.append(position)
    if not instances:
        why = f": all {len(chosen)} rows have empty texts" if chosen else ""
        if rows and not chosen:
            rest = f"the rest of {base} after {named}" if named else "every tenth row of the file"
            why = f": {named.get(split) or rest} has none of the {len(rows)} rows"
        raise DataError(f"the split {split!r} of {data.dataset!r} is empty{why}")
    return instances


def _named_rows(data: DataConfig, base: str, count: int) -> set[int]:
    """The rows of a data set's own split that the config's splits take slices of."""
    slices = [_slice(expression) for _, expression in data.splits]
    taken = [range(count)[start:end] for name, start, end in slices if name == base and (start, end) != (None, None)]
    return set[int]().union(*taken)


def _described(base: str, rows: list[int], count: int) -> str:
    """Rows as slices, ``train[0:30]``; for many slices, their number."""
    breaks = [number for number, (row, following) in enumerate(pairwise(rows), start=1) if following != row + 1]
    if len(breaks) > 2:
        return f"{len(rows)} of the {count} rows of {base}, from {rows[0]} to {rows[-1]}"
    ends = zip([0, *breaks], [*breaks, len(rows)], strict=True)
    return " + ".join(f"{base}[{rows[start]}:{rows[end - 1] + 1}]" for start, end in ends if end > start)


def _slice(expression: str) -> tuple[str, int | None, int | None]:
    """The name, start and end in an expression such as ``train[:-2000]``."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(-?\d+)?:(-?\d+)?\])?", expression)
    if match is None:
        raise DataError(f"expected a split such as 'train' or 'train[:-2000]', got {expression!r}")
    name, start, end = match.groups()
    return name, int(start) if start else None, int(end) if end else None


def _read(data: DataConfig, base: str, split: str) -> tuple[str, Rows]:
    """The file (or hub id) of the data set's own split ``base``, and its rows; ``split`` is for messages."""
    path, columns = Path(data.dataset), dict(data.columns)
    numeric = {columns.get(name, name) for name in ("label", "difficulty")}
    if path.is_file():
        if base != "train":
            raise _no_split(data, base, split, ["train"])
        return str(path), read_rows(path, numeric)
    if path.is_dir() and any((path / f"{name}{suffix}").exists() for name in SPLITS for suffix in FORMATS):
        files = {file.stem: file for suffix in reversed(FORMATS) for file in sorted(path.glob(f"*{suffix}"))}
        if base not in files:
            raise _no_split(data, base, split, sorted(files))
        return str(files[base]), read_rows(files[base], numeric)
    if not path.is_dir() and (
        path.suffix in FORMATS or data.dataset.startswith((".", "/", "~")) or data.dataset.count("/") > 1
    ):
        raise FileNotFoundError(
            f"no data at {data.dataset!r}; expected a JSONL, CSV or Parquet file, a folder with "
            f"{', '.join(f'{s}.jsonl' for s in SPLITS)}, 'procedural', or the id of a data set on the Hugging Face hub"
        )
    parts = [data.dataset, data.subset, data.revision and f"at {data.revision}"]
    return ", ".join(part for part in parts if part), _read_hub(data, base, split)


def _no_split(data: DataConfig, base: str, split: str, known: list[str]) -> FileNotFoundError:
    """The error if a data set has no split ``base``, from which ``split`` is taken."""
    has = "A single file is all 'train'." if Path(data.dataset).is_file() else f"It has {', '.join(known)}."
    return FileNotFoundError(
        f"{data.dataset} has no split {base!r}{nearest(base, known)} {has} Set the rows of {split!r}, such as "
        f'splits={{{split}: "{"train" if "train" in known else known[0]}[-1000:]"}}'
    )


def read_rows(file: Path, numeric: Collection[str] = ("label",)) -> Rows:
    """The rows of a JSONL, CSV or Parquet file; FileNotFoundError or DataError. ``numeric``: see ``read_csv``."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; expected one of the formats {', '.join(FORMATS)}")
    if file.suffix == ".jsonl":
        return read_jsonl(file)
    if file.suffix == ".csv":
        return read_csv(file, numeric)
    if file.suffix not in FORMATS:
        raise DataError(f"{file}: expected one of the formats {', '.join(FORMATS)}")
    return ((f"{file}, row {number}", row) for number, row in enumerate(_read_parquet(file), start=1))


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException  # heavy
    from pyarrow.parquet import ParquetFile

    try:
        parquet = ParquetFile(file)
        columns = parquet.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise ValueError(f"two columns have the same name; the columns are {', '.join(columns)}")
        for batch in parquet.iter_batches():
            yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({one_line(error)})") from error


def _read_hub(data: DataConfig, base: str, split: str) -> Rows:
    """The rows of a split from the hub, or from a local copy of a hub data set."""
    from datasets import get_dataset_split_names, load_dataset, load_dataset_builder

    folder = Path(data.dataset).is_dir()
    if folder and any(sign in str(Path(data.dataset).resolve()) for sign in "*?["):
        raise FileNotFoundError(f"{data.dataset}: the data library reads *, ? and [ as patterns; rename the folder")
    revision = None if folder else data.revision
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        with TemporaryDirectory() as cache:
            builder = load_dataset_builder(data.dataset, data.subset, revision=revision, cache_dir=cache)
        if hasattr(builder.config, "keep_default_na"):  # CSV: "NA" and "null" are texts
            options["keep_default_na"] = False
        if folder:
            # Streamed, with a temporary cache: the library's own cache confuses two folders of the same name.
            with TemporaryDirectory() as cache:
                parts = load_dataset(data.dataset, data.subset, streaming=True, cache_dir=cache, **options)
                known = sorted(parts)
                rows, features = (list(parts[base]), parts[base].features) if base in parts else ([], {})
        else:
            known = get_dataset_split_names(data.dataset, data.subset, revision=revision)
            rows = load_dataset(data.dataset, data.subset, split=base, **options) if base in known else []
            features = getattr(rows, "features", {})
    except Exception as error:  # the library raises errors of many kinds, above all when the hub cannot be reached
        if folder:
            raise FileNotFoundError(
                f"no {base}.jsonl in {data.dataset}, and the folder cannot be read as a copy of a hub data set with "
                f"the split {base!r} (subset {data.subset}): {one_line(error)}"
            ) from error
        raise FileNotFoundError(
            f"cannot load the split {base!r} of {data.dataset!r}: it is no local file or folder, and loading "
            "it from the Hugging Face hub failed. Without network, pass the path of a local copy as dataset=... "
            "(on the command line --set dataset=...)"
        ) from error
    if base not in known:
        raise _no_split(data, base, split, known)
    named = _with_class_names(rows, dict(data.columns).get("label", "label"), features or {})
    return ((f"{data.dataset}, row {number}", row) for number, row in enumerate(named, start=1))


def _with_class_names(
    rows: Iterable[dict[str, Any]], column: str, features: Mapping[str, Any]
) -> Iterable[dict[str, Any]]:
    """The rows; a class index knows the names of the data set's classes if its column has them."""
    names = getattr(features.get(column), "names", None)
    if not names or not all(isinstance(name, str) for name in names):  # YAML reads "no" as a truth value
        return rows
    known = tuple(names)
    return (row | {column: NamedClass.of(row[column], known)} if isinstance(row[column], int) else row for row in rows)


def _check_columns(data: DataConfig, family: Task, task: str, file: str, rows: Sequence[tuple[str, dict]]) -> None:
    """Raise ``DataError`` for ``columns`` of an unknown field, or of an optional one that no row has."""
    fields = tuple(dict.fromkeys((*family.fields, *family.inputs, "difficulty")))
    for name, column in data.columns:
        if name not in fields:
            known = f"{task} has {', '.join(fields)}"
            raise DataError(f"'columns': unknown field {name!r}{nearest(name, fields)} {known}.")
        if name not in family.fields and rows and not any(column in row or name in row for _, row in rows):
            raise DataError(f"{file}: no row has {column!r} (for {name}); the columns are {', '.join(rows[0][1])}")


def _fields(
    row: dict[str, Any], data: DataConfig, family: Task, task: str, origin: str, labelled: bool
) -> dict[str, Any] | None:
    """A row with the task's names for its columns (a local copy may have them already); ``None``: a text is empty."""
    unknown = {} if labelled else {family.reference: family.unknown}
    row = row | unknown
    fields = dict(row)
    for name, column in data.columns:
        if column in row:
            fields[name] = row[column]
        elif name in family.fields and name not in row:
            raise DataError(f"{origin}: no column {column!r} (for {name}); the columns are {', '.join(row)}")
    fields |= unknown
    missing = [name for name in family.fields if name not in fields]
    if missing:
        raise DataError(
            f"{origin}: no field {missing[0]!r}; {task} needs {', '.join(family.fields)}, and the columns are "
            f"{', '.join(row)}: set columns={{{missing[0]}: COLUMN}}"
        )
    for name in dict.fromkeys((*family.needed, *family.inputs)):
        if fields.get(name) is not None:  # an empty cell of a CSV file is None
            check_text(fields[name], name, origin)
    needed = [name for name in family.needed if labelled or name != family.reference]
    return fields if all((fields[name] or "").strip() for name in needed) else None


def _difficulty(value: Any, origin: str) -> int:
    if value is None:
        return 0
    if not is_number(value) or not 0 <= value <= LARGEST or value != int(value):
        raise DataError(
            f"{origin}: difficulty must be a whole number from 1 (trivial) up, or 0 if it is not known, got "
            f"{short(value)}; rename a column that means something else"
        )
    return int(value)
