"""What the commands share at the terminal: options, errors as lines, progress, and the table of a result."""

from __future__ import annotations

import errno
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from sd_gym.errors import quiet, short

# What is printed is text: brackets and colons in names, paths and messages stand for themselves.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)
ADVICE = {
    errno.ENOSPC: "free some space on the disk",
    errno.EDQUOT: "free some space on the disk",
    errno.EFBIG: "choose a disk that takes larger files",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENOTDIR: "choose a folder: what was given is a file, or lies in one",
    errno.EISDIR: "choose a file: what was given is a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


PresetName = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE|none",
        help="Settings of agents that were measured to be better than their defaults; --set wins. env: those that the "
        "env has by itself, if any; refine: to go on from a run (start=RUN); a YAML file such as sd-gym tune writes.",
    ),
]
Imports = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE_OR_FILE",
        help="Import a module or .py file of yours first: what it registers is known then.",
    ),
]


def import_all(names: list[str]) -> list[str]:
    """Import a user's modules; returns their names, with absolute paths."""
    from sd_gym.registry import import_own

    with errors_as_lines():
        return [import_own(name) for name in names]


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """What a user can do something about becomes a line and the exit code 2."""
    threading.excepthook = _thread_failed
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(error)
    except Exception as error:
        if type(error).__module__.startswith("gymnasium.error"):
            _fail(error)
        raise


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; the disk's error is told here too, where it is met."""
    if issubclass(failure.exc_type, OSError):
        errors.print(_as_line(failure.exc_value), soft_wrap=True)
    else:
        threading.__excepthook__(failure)


def _fail(error: Exception) -> None:
    errors.print(_as_line(error), soft_wrap=True)
    raise typer.Exit(2)


def _as_line(error: BaseException) -> Text:
    advice = ADVICE.get(getattr(error, "errno", None))
    said = " ".join(str(error).split()) + (f"; {advice}" if advice else "")
    # Half a character, as a damaged file may hold, cannot be printed.
    said = said.encode(errors="backslashreplace").decode()
    return Text.assemble((type(error).__name__, "bold red"), f": {said}")


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings are printed as lines, at the end."""
    with warnings.catch_warnings(record=True) as noted:
        try:
            yield
        finally:
            for warning in noted:
                errors.print(str(warning.message), style="yellow", highlight=False, soft_wrap=True)


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs, values read as YAML (numbers, booleans, lists, text).

    Raises:
        ValueError: If one is none.
    """
    from sd_gym.envs.config import parse_yaml

    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"--set: expected key=value, got {short(pair)}")
        settings[key] = parse_yaml(value, f"--set {short(pair)}")
    return settings


def status(what: str) -> Status:
    """Says what goes on, while it does."""
    quiet()
    return errors.status(what)


def progress_bar(visible: bool = True) -> Progress:
    """Bars with ``figures`` behind them."""
    quiet()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=errors,
        disable=not visible,
    )


def say(line: str, style: str | None = None) -> None:
    """Print a line beside the results."""
    errors.print(line, style=style, highlight=False, soft_wrap=True)


def print_result(title: str, result: dict[str, Any]) -> None:
    """Print the table of a result."""
    from sd_gym.agents.report.tables import of_result

    console.print(*of_result(title, result), sep="\n")
