"""The answers of an incomplete run over a file, and the state that is needed to resume it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import NonNegativeInt, ValidationError

from sd_gym.files import naming, write_text
from sd_gym.folders import LOCK, contents, locked
from sd_gym.policy.network_files import Strict

STATE, ANSWERS = "part.json", "answers.jsonl"
BLOCK = 2**20  # bytes


class Line(NamedTuple):
    """One row of the input."""

    number: int  # number of its line, from 1
    row: dict[str, Any] | None  # its fields; None where it is malformed
    error: str = ""  # what is wrong with it


class State(Strict):
    """What made the answers, by the names that errors use, and how many there are."""

    made_by: dict[str, str | dict[str, str]]
    line: NonNegativeInt = 0  # last line of the input that is answered
    rows: str = ""  # hash of the rows up to that line
    size: NonNegativeInt = 0  # bytes of the answers
    written: str = ""  # hash of the answers


class Part:
    """The folder ``OUTPUT.part``: answers, which move to ``output`` when complete, and their state.

    Attributes:
        answered: How many lines are answered in a part that is resumed.
        malformed: Its other lines.
    """

    def __init__(self, output: Path, made_by: dict[str, str | dict[str, str]]) -> None:
        self._output = output
        self._folder = output.with_name(output.name + ".part")
        self._file = self._folder / ANSWERS
        self._state = State(made_by=made_by)
        self._rows = hashlib.sha256()
        self._written = hashlib.sha256()
        self.answered = 0
        self.malformed = list[Line]()

    @contextmanager
    def held(self, rows: Iterator[Line], *, resume: bool) -> Iterator[None]:
        """Lock the folder, after all of it was checked; with ``resume``, take the answered rows from ``rows``.

        Raises:
            FolderInUseError: If another process is writing to it.
            FileExistsError: If the output exists, or a part that is not to be resumed, or that is not of such a run.
            ValueError: If the part was made by another policy, or from other rows.
        """
        self._check_own()
        if resume and os.path.lexists(self._output) and not self._file.exists():  # killed as it removed the folder
            shutil.rmtree(self._folder, ignore_errors=True)
        with locked(self._folder):
            if os.path.lexists(self._output):
                raise FileExistsError(f"{self._output} is there already; choose another --output")
            if not contents(self._folder):
                self._write_state()
                self._file.touch()
            elif resume:
                self._go_on(rows)
            else:
                raise FileExistsError(f"{self._folder} is of an interrupted run; continue with --resume, or delete it")
            try:
                yield
            except BaseException:
                if not self._state.line:  # nothing to resume
                    self._file.unlink()
                    (self._folder / STATE).unlink()
                raise

    def add(self, lines: list[Line], answers: str) -> None:
        """Write the answers to the lines that follow."""
        content = answers.encode()
        with naming(self._file), self._file.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._count(lines)
        self._written.update(content)
        self._state.line = lines[-1].number
        self._state.size = self._state.size + len(content)
        self._write_state()

    def complete(self) -> None:
        """Give the output its name, and remove the folder."""
        os.replace(self._file, self._output)
        shutil.rmtree(self._folder)

    def _write_state(self) -> None:
        self._state.rows, self._state.written = self._rows.hexdigest(), self._written.hexdigest()
        write_text(self._folder / STATE, self._state.model_dump_json())

    def _check_own(self) -> None:
        """Raise FileExistsError if ``sd-gym run`` did not write the folder and everything in it."""
        if not os.path.lexists(self._folder):
            return
        own = self._folder.is_dir() and not self._folder.is_symlink()
        files = {file.name: file.is_file() and not file.is_symlink() for file in self._folder.iterdir()} if own else {}
        stray = files.keys() - {STATE, ANSWERS, LOCK, f"{STATE}.tmp"}
        if not own or stray or not all(files.values()) or (ANSWERS in files and STATE not in files):
            raise self._foreign()

    def _foreign(self) -> FileExistsError:
        return FileExistsError(f"{self._folder} was not written by sd-gym run; move it, or choose another --output")

    def _go_on(self, rows: Iterator[Line]) -> None:
        """Resume after the last whole chunk; anything that was written after it is removed."""
        try:
            known = State.model_validate_json((self._folder / STATE).read_bytes())
        except ValidationError as error:
            raise self._foreign() from error
        other = [name for name, value in self._state.made_by.items() if known.made_by.get(name) != value]
        if other:
            known_as = " and another ".join(other)
            raise ValueError(f"{self._folder} was begun with another {known_as}; resume with the same, or delete it")
        self._file.touch()  # a run that was cut off at its beginning has none
        with self._file.open("rb") as file:
            for block in iter(lambda: file.read(min(BLOCK, known.size - file.tell())), b""):
                self._written.update(block)
        if self._written.hexdigest() != known.written:
            raise ValueError(f"{self._file} was changed since it was written; delete {self._folder}")
        last = 0
        while last < known.line and (line := next(rows, None)) is not None:
            self._count([line])
            last = line.number
        if self._rows.hexdigest() != known.rows:
            reason = f"has answers up to line {known.line}, to other rows than the first {known.line} lines"
            raise ValueError(f"{self._folder} {reason} of this input; resume with the same input, or delete it")
        os.truncate(self._file, known.size)
        self._state = known
        with self._file.open(encoding="utf-8") as answers:
            for answer in answers:
                if '"error": ' in answer and "error" in (values := json.loads(answer)):
                    self.malformed.append(Line(values["line"], None, values["error"]))
                else:
                    self.answered += 1

    def _count(self, lines: list[Line]) -> None:
        for line in lines:
            self._rows.update(f"{line!r}\n".encode())
