"""Many inputs from a file, answered into another one: in chunks, in order, and resumable."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from sd_gym.errors import DataError
from sd_gym.inference.part import Line, Part, State
from sd_gym.inference.texts import Answer, SkippingModel, unknown_words
from sd_gym.tasks.data import read_rows
from sd_gym.tasks.files import json_rows
from sd_gym.tasks.metrics import text_quality

CHUNK = 1024  # inputs that are grouped into passes together


@dataclass
class Bulk:
    """What came of a file.

    Attributes:
        rows: Inputs answered, in this run.
        malformed: Lines that are no inputs, with what is wrong with each.
        seconds: Of answering.
        flops_ratio: Of each row, the policy's own FLOPs included.
        dense_seconds: Of answering densely, where that was asked for.
        agree: Whether each row has the dense answer.
        quality: Of each row with a reference: its own and dense.
        unknown: Inputs with words that the tokenizer does not know.
    """

    rows: int = 0
    malformed: list[Line] = field(default_factory=list)
    seconds: float = 0.0
    flops_ratio: list[float] = field(default_factory=list)
    dense_seconds: float = 0.0
    agree: list[bool] = field(default_factory=list)
    quality: list[tuple[float, float]] = field(default_factory=list)
    unknown: int = 0

    def figures(self) -> dict[str, str]:
        """What there is to say, by name."""
        figures = {"rows": f"{self.rows:,}", "rows a second": f"{self.rows / max(self.seconds, 1e-9):.1f}"}
        if self.rows:
            figures["FLOPs"] = f"{np.mean(self.flops_ratio):.1%} of dense"
        if self.agree:
            figures["time"] = f"{self.seconds / self.dense_seconds:.1%} of dense"
            figures["same answer as dense"] = f"{np.mean(self.agree):.2%}"
        if self.quality:
            own, dense = np.mean(self.quality, axis=0)
            figures["quality"] = f"{own:.4f}, dense {dense:.4f} ({len(self.quality):,} rows with a reference)"
        return figures


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
    on_chunk: Callable[[int, Bulk], None] | None = None,
) -> Bulk:
    """Answer each row of a file; the output has a JSON object a row, in the same order.

    Each has ``line`` (the number of the row's line), ``answer``, ``skip`` (0 or 1 a switch), ``token_level``,
    ``flops_ratio`` and ``unknown_tokens``; or ``error``, where the row is malformed, which does not stop the others.
    Blank lines of JSON lines are skipped, but counted. A warning says at the end in how many inputs the tokenizer does
    not know words.

    Until all is done the answers are in the folder ``OUTPUT.part``, which one process holds at a time; a run that was
    cut off goes on behind the last whole chunk.

    Args:
        model: What answers.
        source: A ``.jsonl``, ``.csv`` or ``.parquet`` file; ``None``: JSON lines from the standard input.
        output: The file to write.
        resume: Whether to go on with what a run that was cut off has left.
        compare: Whether everything runs densely as well.
        columns: The column of each field that is called differently.
        batch_size: As of ``SkippingModel``.
        chunk: Rows that are grouped into passes together.
        on_chunk: Called after each chunk with the rows done so far and what came of them.

    Raises:
        FileNotFoundError: If there is no such file.
        FolderInUseError: If another process is writing the same output.
        FileExistsError: If the output is there, or a part of it and it shall not be resumed or was not written here.
        ValueError: If a column is given for a field that the task does not have; or if what shall be resumed was made
            by another policy, operating point or backbone, with other columns, or of another input.
    """
    columns = columns or {}
    for name in columns:
        if name not in (known := [*model.fields, model.reference]):
            raise ValueError(f"--column: there is no field {name!r}; the task's are {', '.join(known)} (FIELD=COLUMN)")
    rows = _read(source, columns)
    rows = chain(list(islice(rows, 1)), rows)  # an input that cannot be read leaves no part behind
    bulk, part = Bulk(), Part(output, State(**model.fingerprints, columns=columns))
    with part.held(rows, resume=resume):
        while lines := list(islice(rows, chunk)):
            part.add(lines, "".join(_answered(model, lines, bulk, compare, batch_size)))
            if on_chunk is not None:
                on_chunk(lines[-1].number, bulk)
        part.complete()
    if bulk.unknown:
        warnings.warn(unknown_words(bulk.unknown, bulk.rows), stacklevel=2)
    return bulk


def rows_of(source: Path | None) -> int | None:
    """How many rows a file of JSON lines has; ``None`` of any other, whose rows cannot be told from its lines."""
    if source is None or source.suffix != ".jsonl" or not source.is_file():
        return None
    with source.open("rb") as lines:
        return sum(1 for _ in lines)


def _answered(
    model: SkippingModel, lines: list[Line], bulk: Bulk, compare: bool, batch_size: int | None
) -> Iterator[str]:
    """The output's lines for some of the input's."""
    good, wrong = [], {}  # of these lines those that are inputs, with their texts; and what is wrong with the others
    for line in lines:
        try:
            good.append((line, model.checked(line.row)))
        except ValueError as error:
            wrong[line.number] = line.error or str(error)
    started = time.perf_counter()
    answers, refused = _answers(model, good, batch_size)
    bulk.seconds += time.perf_counter() - started
    wrong |= refused
    good = [(line, texts) for line, texts in good if line.number in answers]
    bulk.rows += len(good)
    bulk.malformed += [line._replace(error=wrong[line.number]) for line in lines if line.number in wrong]
    bulk.flops_ratio += [answer.flops_ratio for answer in answers.values()]
    bulk.unknown += sum(answer.unknown_tokens > 0 for answer in answers.values())
    if compare:
        started = time.perf_counter()
        dense = model.answers([texts for _, texts in good], dense=True, batch_size=batch_size)
        bulk.dense_seconds += time.perf_counter() - started
        for (line, _), other in zip(good, dense, strict=True):
            both = answers[line.number].answer, other.answer
            bulk.agree.append(both[0] == both[1])
            if (references := model.references(line.row)) is not None:
                bulk.quality.append(tuple(text_quality(model.metric, one, references) for one in both))
    for line in lines:
        told = {"error": wrong[line.number]} if line.number in wrong else _described(answers[line.number])
        yield json.dumps({"line": line.number, **told}, ensure_ascii=False) + "\n"


def _answers(
    model: SkippingModel, inputs: list[tuple[Line, list[str]]], batch_size: int | None
) -> tuple[dict[int, Answer], dict[int, str]]:
    """Answers by the number of the line; and of inputs that cannot be encoded (a question that is too long), why."""
    try:
        answers = model.answers([texts for _, texts in inputs], batch_size=batch_size)
    except DataError as error:
        if len(inputs) == 1:
            return {}, {inputs[0][0].number: str(error)}
        half = len(inputs) // 2
        (first, wrong), (second, more) = (_answers(model, part, batch_size) for part in (inputs[:half], inputs[half:]))
        return first | second, wrong | more
    return dict(zip([line.number for line, _ in inputs], answers, strict=True)), {}


def _described(answer: Answer) -> dict[str, Any]:
    skip = answer.skip.astype(int).tolist()
    return {**answer._asdict(), "skip": skip, "flops_ratio": round(answer.flops_ratio, 6)}


def _read(source: Path | None, columns: dict[str, str]) -> Iterator[Line]:
    """The rows of a file; of JSON lines each is read by itself, so that one that is broken stops no other."""
    if source is not None and source.suffix != ".jsonl":
        for number, (_, row) in enumerate(read_rows(source), start=1):
            yield Line(number, _renamed(row, columns))
        return
    if source is not None and not source.is_file():
        raise FileNotFoundError(f"no file {source}; expected .jsonl, .csv or .parquet")
    with sys.stdin.buffer if source is None else source.open("rb") as lines:
        for number, row in json_rows(lines):
            if isinstance(row, DataError):
                yield Line(number, None, str(row))
            else:
                yield Line(number, _renamed(row, columns))


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {**row, **{name: row[column] for name, column in columns.items() if column in row}}
