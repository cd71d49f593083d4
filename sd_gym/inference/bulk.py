"""Many inputs from a file, answered into another one: in chunks, in order, resumable."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sd_gym.inference.texts import Answer, SkippingModel
from sd_gym.tasks.data import DataError, read_rows
from sd_gym.tasks.metrics import text_quality

CHUNK = 1024  # inputs that are grouped into passes together


class Line(NamedTuple):
    """One row of the input.

    Attributes:
        number: From 1.
        row: Its fields; ``None`` where it is malformed.
        error: What is wrong with it.
    """

    number: int
    row: dict[str, Any] | None
    error: str = ""


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
    """

    rows: int = 0
    malformed: list[Line] = field(default_factory=list)
    seconds: float = 0.0
    flops_ratio: list[float] = field(default_factory=list)
    dense_seconds: float = 0.0
    agree: list[bool] = field(default_factory=list)
    quality: list[tuple[float, float]] = field(default_factory=list)

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

    Each has ``line`` (the row's number), ``answer``, ``skip`` (0 or 1 a switch), ``token_level`` and ``flops_ratio``;
    or ``error``, where the row is malformed, which does not stop the others. Until all is done the output has the name
    ``OUTPUT.part``; a run that was cut off goes on behind the last whole chunk.

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
        FileExistsError: If the output is there, or a part of it and it shall not be resumed.
        ValueError: If a column is given for a field that the task does not have.
    """
    for name in columns or ():
        if name not in (known := [*model.fields, model.reference]):
            raise ValueError(f"--column: there is no field {name!r}; the task's are {', '.join(known)} (FIELD=COLUMN)")
    part, bulk = output.with_name(output.name + ".part"), Bulk()
    if output.exists():
        raise FileExistsError(f"{output} is there already; choose another --output")
    if part.exists() and not resume:
        raise FileExistsError(f"{part} was left by a run that was cut off; go on with --resume, or delete it")
    done = _whole_lines(part) if part.exists() else 0
    rows = (line for line in _read(source, columns or {}) if line.number > done)
    lines = list(islice(rows, chunk))  # an input that cannot be read leaves no part behind
    output.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as written:
        while lines:
            written.write("".join(_answered(model, lines, bulk, compare, batch_size)).encode())
            written.flush()
            os.fsync(written.fileno())
            if on_chunk is not None:
                on_chunk(lines[-1].number, bulk)
            lines = list(islice(rows, chunk))
    os.replace(part, output)
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
    good, inputs = [], []
    for line in lines:
        try:
            if line.row is None:
                raise ValueError(line.error)
            inputs.append(model.checked(line.row))
            good.append(line)
        except ValueError as error:
            bulk.malformed.append(line._replace(error=str(error)))
    started = time.perf_counter()
    answers = dict(zip([line.number for line in good], model(inputs, batch_size=batch_size), strict=True))
    bulk.seconds += time.perf_counter() - started
    bulk.rows += len(good)
    bulk.flops_ratio += [answer.flops_ratio for answer in answers.values()]
    if compare:
        started = time.perf_counter()
        dense = model(inputs, dense=True, batch_size=batch_size)
        bulk.dense_seconds += time.perf_counter() - started
        bulk.agree += [own.answer == other.answer for own, other in zip(answers.values(), dense, strict=True)]
        for line, own, other in zip(good, answers.values(), dense, strict=True):
            if (references := model.references(line.row)) is not None:
                bulk.quality.append(tuple(text_quality(model.metric, one.answer, references) for one in (own, other)))
    wrong = {line.number: line.error for line in bulk.malformed}
    for line in lines:
        told = {"error": wrong[line.number]} if line.number in wrong else _described(answers[line.number])
        yield json.dumps({"line": line.number, **told}, ensure_ascii=False) + "\n"


def _described(answer: Answer) -> dict[str, Any]:
    skip = answer.skip.astype(int).tolist()
    return {**answer._asdict(), "skip": skip, "flops_ratio": round(answer.flops_ratio, 6)}


def _read(source: Path | None, columns: dict[str, str]) -> Iterator[Line]:
    """The rows of a file; of JSON lines each is read by itself, so that one that is broken stops no other."""
    if source is not None and source.suffix != ".jsonl":
        rows = ((number, row) for number, (_, row) in enumerate(read_rows(source), start=1))
        yield from (Line(number, _renamed(row, columns)) for number, row in rows)
        return
    if source is not None and not source.is_file():
        raise FileNotFoundError(f"no file {source}; expected .jsonl, .csv or .parquet")
    with sys.stdin.buffer if source is None else source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield Line(number, None, f"not JSON ({error})")
                continue
            if isinstance(row, dict):
                yield Line(number, _renamed(row, columns))
            else:
                yield Line(number, None, f"expected a JSON object, got {type(row).__name__}")


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {**row, **{name: row[column] for name, column in columns.items() if column in row}}


def _whole_lines(part: Path) -> int:
    """How many whole lines there are; half a one at the end is cut off."""
    content = part.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with part.open("r+b") as file:
            file.truncate(whole)
    if not whole:
        return 0
    try:
        return json.loads(content[:whole].splitlines()[-1])["line"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{part} was not written here; delete it, or choose another --output") from error
