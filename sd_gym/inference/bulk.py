"""Answer many inputs from a file into another file: in chunks, in order, and resumable."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain, islice
from operator import iadd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sd_gym import cluster
from sd_gym.errors import DataError, short
from sd_gym.inference.answer import Answer, unknown_words
from sd_gym.inference.part import Line, Part
from sd_gym.inference.texts import SkippingModel
from sd_gym.tasks.data import read_rows
from sd_gym.tasks.files import json_rows
from sd_gym.version import __version__

CHUNK = 1024  # inputs that are grouped into passes together
WARM_UP = 8  # inputs that are answered both ways before a comparison is timed


@dataclass
class Bulk:
    """The outcome of a run over a file."""

    rows: int = 0  # inputs answered, in this run
    malformed: list[Line] = field(default_factory=list)  # malformed lines of the whole output, each with its error
    before: int = 0  # lines answered before this run, which resumed
    seconds: float = 0.0  # seconds of answering
    flops_ratio: list[float] = field(default_factory=list)  # of each row, the policy's own FLOPs included
    dense_seconds: float = 0.0  # seconds of answering densely, if requested
    agree: list[bool] = field(default_factory=list)  # whether each row has the dense answer
    quality: list[tuple[float, float]] = field(default_factory=list)  # own and dense one, of rows with a reference
    unknown: int = 0  # inputs with words that the tokenizer does not know

    def __iadd__(self, other: Bulk) -> Bulk:
        for part in fields(self):
            setattr(self, part.name, iadd(getattr(self, part.name), getattr(other, part.name)))
        return self

    @property
    def speed(self) -> str:
        """Rows a second, as text."""
        return f"{self.rows / max(self.seconds, 1e-9):.1f}"

    def figures(self) -> dict[str, str]:
        """Means, by name, as text."""
        before = f" (after {self.before:,} before)" if self.before else ""
        figures = {"rows": f"{self.rows:,}{before}", "rows a second": self.speed}
        if self.rows:
            figures["FLOPs"] = f"{np.mean(self.flops_ratio):.1%} of dense"
        if self.agree:
            figures["time"] = f"{self.seconds / self.dense_seconds:.1%} of dense"
            figures["same answer as dense"] = f"{np.mean(self.agree):.2%}"
        if self.quality:
            own, dense = np.mean(self.quality, axis=0)
            figures["quality"] = f"{own:.4f}, dense {dense:.4f} ({len(self.quality):,} rows with a reference)"
        return figures


class OnCluster(NamedTuple):
    """How a Ray cluster answers: each of its processes loads the model once."""

    address: str  # as for ``sd_gym.train_all``
    make: Callable[[], Any]  # loads the model
    imports: Sequence[str] = ()  # modules and files that are imported first
    on_gpu: bool = False  # whether each process needs a GPU


def run_file(
    model: SkippingModel,
    source: Path | None,
    output: Path,
    *,
    resume: bool = False,
    compare: bool = False,
    columns: dict[str, str] | None = None,
    batch_size: int | None = None,
    chunk: int = CHUNK,
    on_cluster: OnCluster | None = None,
    on_chunk: Callable[[int, Bulk], None] | None = None,
) -> Bulk:
    """Answer each row of a file; the output has a JSON object per row, in the same order.

    Each has ``line`` (the number of the row's line) and the fields of ``Answer``; or ``error``, where the row is
    malformed, which does not stop the others. Blank lines of JSON lines are skipped, but counted. Until all is done the
    answers are in the folder ``OUTPUT.part``, which one process holds at a time.

    Args:
        model: A policy and its backbone.
        source: A ``.jsonl``, ``.csv`` or ``.parquet`` file; ``None``: JSON lines from the standard input.
        output: The file to write.
        resume: Whether to go on after the last whole chunk of an interrupted run.
        compare: Whether everything runs densely as well.
        columns: The column of each field whose column has another name.
        batch_size: See ``TextModel``.
        chunk: Rows that are grouped into passes together.
        on_cluster: A Ray cluster that answers the chunks instead.
        on_chunk: Called after each chunk with the number of its last line and the outcome so far.

    Raises:
        FileNotFoundError: If there is no such file.
        FolderInUseError, FileExistsError: See ``Part.held``.
        ValueError: See ``Part.held``; or if a column is given for a field that the task does not have.

    Warns if no row has the column of a field that may be missing.
    """
    columns = columns or {}
    for name in columns:
        if name not in (known := [*model.fields, model.reference]):
            raise ValueError(f"--column: there is no field {name!r}; the task's are {', '.join(known)} (FIELD=COLUMN)")
    may_lack = {model.reference, *([model.fields[-1]] if model.optional else [])}
    rows = _read(source, columns, may_lack)
    rows = chain(list(islice(rows, 1)), rows)  # an input that cannot be read leaves no part
    prints = model.fingerprints
    made_by = {"policy (or operating point)": prints["policy"], "backbone": prints["backbone"]}
    bulk, part = Bulk(), Part(output, {**made_by, "--column": columns, "version of sd_gym": __version__})
    with part.held(rows, resume=resume):
        bulk.before = part.answered
        bulk.malformed = part.malformed
        chunks = iter(lambda: list(islice(rows, chunk)), [])
        if on_cluster is None:
            answered = ((lines, _answered(model, lines, compare, batch_size)) for lines in chunks)
        else:
            address, make, imports, on_gpu = on_cluster
            load = partial(_answering, make, compare, batch_size)
            answered = cluster.in_order(cluster.connect(address), load, chunks, imports, on_gpu=on_gpu)
        for lines, (answers, outcome) in answered:
            part.add(lines, answers)
            bulk += outcome
            if on_chunk is not None:
                on_chunk(lines[-1].number, bulk)
        part.complete()
    if bulk.unknown:
        warnings.warn(unknown_words(bulk.unknown, bulk.rows), stacklevel=2)
    return bulk


def count_rows(source: Path | None) -> int | None:
    """The number of rows in a file of JSON lines; ``None`` for other formats, whose rows are not lines."""
    if source is None or source.suffix != ".jsonl" or not source.is_file():
        return None
    with source.open("rb") as lines:
        return sum(1 for _ in lines)


def _answering(make: Callable[[], Any], compare: bool, batch_size: int | None) -> Callable[[list[Line]], Any]:
    return partial(_answered, make(), compare=compare, batch_size=batch_size)


def _answered(model: SkippingModel, lines: list[Line], compare: bool, batch_size: int | None) -> tuple[str, Bulk]:
    """The output for a chunk of the input, and the outcome."""
    bulk = Bulk()
    inputs, errors = {}, {}  # texts of the lines that are inputs, and what is wrong with the others
    for line in lines:
        try:
            inputs[line.number] = model.checked(line.row)
        except ValueError as error:
            errors[line.number] = line.error or str(error)
    if compare:  # the first pass reads weights and starts threads, which neither timing should count
        for dense in (True, False):
            _answers(model, dict(list(inputs.items())[:WARM_UP]), batch_size, dense=dense)
    started = time.perf_counter()
    answers, refused = _answers(model, inputs, batch_size)
    bulk.seconds += time.perf_counter() - started
    errors |= refused
    bulk.rows += len(answers)
    bulk.malformed += [line._replace(error=errors[line.number]) for line in lines if line.number in errors]
    bulk.flops_ratio += [answer.flops_ratio for answer in answers.values()]
    bulk.unknown += sum(answer.unknown_tokens > 0 for answer in answers.values())
    if compare:
        started = time.perf_counter()
        dense = model.answers([inputs[number] for number in answers], dense=True, batch_size=batch_size)
        bulk.dense_seconds += time.perf_counter() - started
        rows = [line.row or {} for line in lines if line.number in answers]
        for row, own, dense_answer in zip(rows, answers.values(), dense, strict=True):
            bulk.agree.append(own.answer == dense_answer.answer)
            if model.reference not in row:
                continue
            own_quality, dense_quality = (
                model.quality(answer.answer, row[model.reference]) for answer in (own, dense_answer)
            )
            if own_quality is not None and dense_quality is not None:
                bulk.quality.append((own_quality, dense_quality))
    contents = {number: _described(answer) for number, answer in answers.items()}
    contents |= {number: {"error": error} for number, error in errors.items()}
    output = [json.dumps({"line": number, **contents[number]}, ensure_ascii=False) + "\n" for number, *_ in lines]
    return "".join(output), bulk


def _answers(
    model: SkippingModel, inputs: dict[int, list[str]], batch_size: int | None, *, dense: bool = False
) -> tuple[dict[int, Answer], dict[int, str]]:
    """Answers by line number, and the errors of inputs that cannot be encoded (a question that is too long)."""
    numbers = list(inputs)
    try:
        answers = model.answers(list(inputs.values()), dense=dense, batch_size=batch_size)
        return dict(zip(numbers, answers, strict=True)), {}
    except DataError as error:
        if len(inputs) == 1:
            return {}, {numbers[0]: str(error)}
    half = len(inputs) // 2
    halves = [{number: inputs[number] for number in part} for part in (numbers[:half], numbers[half:])]
    (first, wrong), (second, more) = (_answers(model, part, batch_size, dense=dense) for part in halves)
    return first | second, wrong | more


def _described(answer: Answer) -> dict[str, Any]:
    skip = answer.skip.astype(int).tolist()
    return {**answer._asdict(), "skip": skip, "flops_ratio": round(answer.flops_ratio, 6)}


def _read(source: Path | None, columns: dict[str, str], may_lack: set[str]) -> Iterator[Line]:
    """The rows of a file; JSON lines are read one by one, so that a broken one does not stop the others.

    A row without the column of a field is broken; of JSON lines, it may lack the fields ``may_lack``.
    """
    if source is not None and source.suffix != ".jsonl" and not source.is_fifo():
        for number, (_, row) in enumerate(read_rows(source, {columns.get("label", "label")}), start=1):
            yield _renamed(number, row, columns, set())
        return
    if source is not None and (source.is_dir() or not source.exists()):  # it may be a pipe
        raise FileNotFoundError(f"no file {source}; expected .jsonl, .csv or .parquet")
    unseen, seen = {name: column for name, column in columns.items() if name in may_lack}, False
    with sys.stdin.buffer if source is None else source.open("rb") as lines:
        for number, row in json_rows(lines):
            if isinstance(row, DataError):
                yield Line(number, None, str(row))
                continue
            unseen = {name: column for name, column in unseen.items() if column not in row} if unseen else unseen
            seen = True
            yield _renamed(number, row, columns, may_lack)
    for name, column in unseen.items() if seen else ():
        warnings.warn(f"--column: no row has {column!r} (for {name}), so all were read without it", stacklevel=2)


def _renamed(number: int, row: dict[str, Any], columns: dict[str, str], may_lack: set[str]) -> Line:
    missing = [name for name, column in columns.items() if column not in row and name not in may_lack]
    if missing:
        has = ", ".join(map(str, row))
        return Line(number, None, f"no column {columns[missing[0]]!r} (for {missing[0]}); the columns are {short(has)}")
    others = {name: value for name, value in row.items() if name not in columns}
    return Line(number, others | {name: row[column] for name, column in columns.items() if column in row})
