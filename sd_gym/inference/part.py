"""The answers of a run over a file that is not complete yet: who writes them, what made them, how far they go."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from sd_gym.files import write_text
from sd_gym.folders import LOCK, contents, locked
from sd_gym.version import __version__

STATE, ANSWERS = "part.json", "answers.jsonl"
BLOCK = 2**20  # bytes


class Line(NamedTuple):
    """One row of the input.

    Attributes:
        number: Of its line, from 1.
        row: Its fields; ``None`` where it is malformed.
        error: What is wrong with it.
    """

    number: int
    row: dict[str, Any] | None
    error: str = ""


class State(BaseModel):
    """What made the answers, and how far they go.

    Attributes:
        sd_gym: The version.
        policy: Hash of the policy at its operating point.
        backbone: Hash of the backbone's weights.
        columns: The column of each field that is called differently.
        line: Number of the last line of the input that is answered.
        rows: Hash of the rows up to there.
        size: Bytes of the answers up to there.
        written: Hash of them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    sd_gym: str = __version__
    policy: str
    backbone: str
    columns: dict[str, str]
    line: NonNegativeInt = 0
    rows: str = ""
    size: NonNegativeInt = 0
    written: str = ""

    @property
    def made_by(self) -> dict[str, Any]:
        """What made the answers, as an error names it."""
        return {
            "policy (or operating point)": self.policy,
            "backbone": self.backbone,
            "--column": self.columns,
            "version of sd_gym": self.sd_gym,
        }


class Part:
    """The folder ``OUTPUT.part``: the answers, and their state, which is written behind each chunk.

    Args:
        output: Where the answers shall be when all are there.
        state: What makes them.
    """

    def __init__(self, output: Path, state: State) -> None:
        self._output, self._folder = output, output.with_name(output.name + ".part")
        self._file, self._state = self._folder / ANSWERS, state
        self._rows, self._written = hashlib.sha256(), hashlib.sha256()

    @contextmanager
    def held(self, rows: Iterator[Line], *, resume: bool) -> Iterator[None]:
        """Keep it from other processes meanwhile; before, everything in it is checked, and nothing is changed.

        Args:
            rows: Of the input; the answered ones are taken from it.
            resume: Whether to go on with the answers that are there.

        Raises:
            FolderInUseError: If another process is writing to it.
            FileExistsError: If the output is there, or a part of it that shall not be resumed, or was not written here.
            ValueError: If the part was made by something else, or of other rows.
        """
        self._check_own()
        with locked(self._folder):
            if os.path.lexists(self._output):
                raise FileExistsError(f"{self._output} is there already; choose another --output")
            if contents(self._folder):
                if not resume:
                    raise FileExistsError(
                        f"{self._folder} was left by a run that was cut off; go on with --resume, or delete it"
                    )
                self._go_on(rows)
            else:
                self._write_state()
                self._file.touch()
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
        with self._file.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._count(lines)
        self._written.update(content)
        self._state.line, self._state.size = lines[-1].number, self._state.size + len(content)
        self._write_state()

    def complete(self) -> None:
        """Give the output its name, and take the folder away."""
        os.replace(self._file, self._output)
        shutil.rmtree(self._folder)

    def _write_state(self) -> None:
        self._state.rows, self._state.written = self._rows.hexdigest(), self._written.hexdigest()
        write_text(self._folder / STATE, self._state.model_dump_json())

    def _check_own(self) -> None:
        """Raise FileExistsError if anything stands in its place, or in it, that ``sd-gym run`` did not write."""
        if not os.path.lexists(self._folder):
            return
        own = self._folder.is_dir() and not self._folder.is_symlink()
        names = {file.name: file.is_file() and not file.is_symlink() for file in self._folder.iterdir()} if own else {}
        stray = names.keys() - {STATE, ANSWERS, LOCK, f"{STATE}.tmp"}
        if not own or stray or not all(names.values()) or (ANSWERS in names and STATE not in names):
            raise self._foreign()

    def _foreign(self) -> FileExistsError:
        return FileExistsError(
            f"{self._folder} was not written by sd-gym run; nothing was changed. Move it away, or choose another "
            "--output"
        )

    def _go_on(self, rows: Iterator[Line]) -> None:
        """Go on behind the last whole chunk; what a run that was cut off has written behind that is cut off."""
        try:
            known = State.model_validate_json((self._folder / STATE).read_bytes())
        except ValidationError as error:
            raise self._foreign() from error
        other = [name for name, value in self._state.made_by.items() if known.made_by[name] != value]
        if other:
            raise ValueError(
                f"{self._folder} was begun with another {' and another '.join(other)}; resume it with the same, or "
                "delete it"
            )
        self._read_answers(known.size)
        if self._written.hexdigest() != known.written:
            raise ValueError(f"{self._file} was changed since it was written; delete {self._folder}")
        last = 0
        while last < known.line:
            line = next(rows, None)
            if line is None or line.number > known.line:
                raise ValueError(
                    f"{self._folder} has answers up to line {known.line} of its input, and this input has no such row: "
                    "it is another one. Resume with the same, or delete the part"
                )
            self._count([line])
            last = line.number
        if self._rows.hexdigest() != known.rows:
            raise ValueError(
                f"{self._folder} has answers to other rows than the first {known.line} lines of this input; resume "
                "with the same input, or delete the part"
            )
        os.truncate(self._file, known.size)
        self._state = known

    def _count(self, lines: list[Line]) -> None:
        for line in lines:
            self._rows.update(f"{line!r}\n".encode())

    def _read_answers(self, size: int) -> None:
        """Hash the first bytes of the answers."""
        with self._file.open("rb") as file:
            while size > 0 and (block := file.read(min(BLOCK, size))):
                self._written.update(block)
                size -= len(block)
