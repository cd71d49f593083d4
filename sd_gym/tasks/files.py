"""Rows of JSONL and CSV files, each with its place in the file, for error messages."""

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from sd_gym.errors import DataError

Rows = Iterable[tuple[str, dict[str, Any]]]  # (place, row)

WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_jsonl(file: Path) -> Rows:
    """The rows of a file of JSON lines, without blank lines; DataError if a line is not a JSON object in UTF-8."""
    with file.open("rb") as lines:
        for number, row in json_rows(lines):
            if isinstance(row, DataError):
                raise DataError(f"{file}, line {number}: {row}") from row
            yield f"{file}, line {number}", row


def json_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """The rows of JSON lines, without blank lines, each with the number of its line, from 1.

    A line that is not a JSON object in UTF-8 gives its error in place of a row.
    """
    for number, line in enumerate(lines, start=1):
        try:
            text = _decoded(line, number)
            if not text.strip():
                continue
            row = json.loads(text)
            if not isinstance(row, dict):
                row = DataError(f"expected a JSON object, got {type(row).__name__}")
        except DataError as error:
            row = error
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            row = DataError(f"not JSON ({reason})")
        yield number, row


def read_csv(file: Path, numeric: Collection[str]) -> Rows:
    """The rows of a CSV file; DataError if it is not CSV in UTF-8.

    Cells are texts, even ``NA``, ``null`` and ``12``; empty ones are ``None``. Only the ``numeric`` columns have
    numbers, if all their cells look like numbers.
    """
    csv.field_size_limit(2**31 - 1)  # the library's own limit is shorter than many documents
    reader = csv.reader(_lines(file), strict=True)
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{file}, line 1: two columns have the same name; the columns are {', '.join(header)}")
        for cells in reader:
            origin = f"{file}, line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{origin}: expected {len(header)} cells ({', '.join(header)}), got {len(cells)}; put a cell with "
                    "a comma in double quotes"
                )
            if cells:
                rows.append((origin, {name: cell or None for name, cell in zip(header, cells, strict=True)}))
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not CSV ({error})") from error
    for name in set(numeric) & set(header):
        cells = [row for _, row in rows if row[name] is not None]
        for pattern, number in ((WHOLE, int), (DECIMAL, float)):
            if all(pattern.fullmatch(row[name]) for row in cells):
                for row in cells:
                    row[name] = number(row[name])
                break
    return rows


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _decoded(line, number)
            except DataError as error:
                raise DataError(f"{file}, line {number}: {error}") from error


def _decoded(line: bytes, number: int) -> str:
    """The text of a line; DataError if it is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")  # some programs write a byte-order mark
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from error
