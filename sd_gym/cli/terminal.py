"""Options, error messages, progress and printing that the commands share."""

import errno
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from inspect import signature
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from typer import Option

from sd_gym.errors import MissingExtraError, quiet, short

# Without markup, so that brackets and colons in names, paths and messages are printed as they are.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)
FIRST_LINE, EVERY_LINE = 5.0, 60.0  # seconds between plain lines without a terminal
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space on the disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose a folder that you may write to"),
    errno.EFBIG: "choose a disk that takes larger files",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.ENOTDIR: "choose a folder; this is a file, or is inside a file",
    errno.EISDIR: "choose a file; this is a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EEXIST: "choose another name; this is a file, or a link to nothing",
}

# Arguments that no option sets.
NO_OPTIONS = ("env_id", "env_or_run", "run", "on_progress", "on_trial", "settings", "places")
NO_OPTIONS += ("policy", "select", "policy_flops", "name")

Imports = Annotated[
    list[str],
    Option("--import", metavar="MODULE_OR_FILE", help="Import your module, .py file or env (.yaml) first."),
]
Settings = Annotated[
    list[str],
    Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the env's config, or a setting of the agent; repeatable."
    ),
]
Places = Annotated[
    list[str],
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Of a run: where its dataset, backbone or table is now, if it moved. Of an env: a key of its config.",
    ),
]
Confidence = Annotated[
    float, Option(min=0.5, max=0.9999, help="Confidence of the guarantee that less than epsilon is lost.")
]
Ray = Annotated[str | None, Option(metavar="ADDRESS", help="A Ray cluster instead, which can access OUTPUT.")]


def import_all(names: list[str]) -> list[str]:
    """Import a user's modules; returns their names, with absolute paths."""
    from sd_gym.registration import import_own

    with errors_as_lines():
        return [import_own(name) for name in names]


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Print errors that a user can fix as one line, with exit code 2."""
    threading.excepthook = _thread_failed
    try:
        yield
    except Exception as error:
        fixable = isinstance(error, ValueError | OSError | FloatingPointError | MissingExtraError)
        if not fixable and not type(error).__module__.startswith("gymnasium.error"):
            raise
        _print_error(error)
        raise typer.Exit(2) from None


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Print no errors of the disk in TensorBoard's threads: it raises them in the main one, too."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _print_error(error: BaseException) -> None:
    advice = ADVICE.get(getattr(error, "errno", None) or 0)
    message = " ".join(str(error).split()) + (f"; {advice}" if advice else "")
    errors.print(Text.assemble((type(error).__name__, "bold red"), f": {message}"), soft_wrap=True)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings as lines, at the end."""
    with warnings.catch_warnings(record=True) as recorded:
        try:
            yield
        finally:
            for warning in recorded:
                say(str(warning.message), "yellow")


def settings_of(pairs: list[str], call: Callable[..., Any] | None = None) -> dict[str, Any]:
    """``key=value`` pairs of ``--set`` as a dictionary of YAML values; a ``ValueError`` names the option.

    They are passed on to ``call``, whose own arguments are options of the command.
    """
    from sd_gym.envs.config import parse_yaml

    settings = {}
    for key, value in pairs_of(pairs, "--set"):
        pair = short(f"{key}={value}")
        if call is not None and key in signature(call).parameters:
            name = {"imports": "import", **dict.fromkeys(NO_OPTIONS)}.get(key, key)
            advice = f"use the option --{name}" if name else "leave it out"
            raise ValueError(f"--set {pair}: {key} is not a setting; {advice}")
        settings[key] = parse_yaml(value, f"--set {pair}")
    return settings


def pairs_of(pairs: list[str], option: str) -> Iterator[tuple[str, str]]:
    """The keys and values of ``key=value`` pairs, as they are; a ``ValueError`` names the option."""
    keys = set[str]()
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"{option}: expected key=value, got {short(pair)}")
        if key in keys:
            raise ValueError(
                f"{option}: {key} is given twice, the second time as {short(value)}; leave one of them out"
            )
        keys.add(key)
        yield key, value


@contextmanager
def status(what: str) -> Iterator[None]:
    """Show what is running: a spinner at a terminal, otherwise a plain line now and then."""
    quiet()
    _say_if_busy()
    begun = time.monotonic()
    with errors.status(what), _plain_lines(lambda: f"{what}, {_duration(time.monotonic() - begun)} so far"):
        yield


@contextmanager
def progress_bar(visible: bool = True) -> Iterator[Progress]:
    """Bars with ``figures``, if ``visible``; without a terminal, a plain line now and then."""
    quiet()
    if visible:
        _say_if_busy()
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=13)),  # a narrow terminal cuts figures
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[figures]}", markup=False),
        console=errors,
        disable=not (visible and errors.is_terminal),
        speed_estimate_period=600,  # seconds; a shorter period gives no estimate if each step takes a second
    )
    lines = _plain_lines(lambda: "; ".join(map(_task_line, progress.tasks))) if visible else nullcontext()
    with progress, lines:
        yield progress


@contextmanager
def _plain_lines(line: Callable[[], str]) -> Iterator[None]:
    """Without a terminal, write what ``line`` returns now and then, from a thread."""
    if errors.is_terminal:
        yield
        return
    ended = threading.Event()

    def write() -> None:
        seconds = FIRST_LINE
        while not ended.wait(seconds):
            say(line())
            seconds = EVERY_LINE

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def figures_text(figures: dict[str, float]) -> str:
    """Figures as the text of a bar."""
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


def _task_line(task: Task) -> str:
    """Progress of a task, such as ``learning 2048 of 50000, quality 0.981, 0:03:10 left``."""
    steps = f"{task.completed:.0f}" if task.total is None else f"{task.completed:.0f} of {task.total:.0f}"
    left = "" if task.finished or task.time_remaining is None else f"{_duration(task.time_remaining)} left"
    return ", ".join(filter(None, [f"{task.description} {steps}", task.fields["figures"], left]))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _say_if_busy() -> None:
    """Warn if the machine is busy, which makes a command with several threads many times slower."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if cores > 1 and load > cores / 2 and os.environ.get("OMP_NUM_THREADS") != "1":
        say(
            f"This machine is busy (load {load:.1f} on {cores} cores), which makes several threads many times slower: "
            "set OMP_NUM_THREADS=1, or stop other programs",
            "yellow",
        )


def say(line: str, style: str | None = None) -> None:
    """Print a line to standard error, apart from the results."""
    errors.print(line, style=style, highlight=False, soft_wrap=True)


def print_line(line: str) -> None:
    """Print a line of the results without wrapping it, so that it can be copied."""
    console.print(line, highlight=False, soft_wrap=True)


def print_result(title: str, result: dict[str, Any]) -> None:
    """Print the table of a result."""
    from sd_gym.agents.report.terminal import result_tables

    console.print(*result_tables(title, result), sep="\n", crop=False)
