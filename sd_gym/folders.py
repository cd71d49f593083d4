"""Output folders of commands: locked against other processes, and refused if they hold other files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sd_gym.files import naming

MARKER = "sd_gym"  # the key in our files for the version that wrote them
LOCK = ".lock"
SHOWN = 5


class FolderInUseError(FileExistsError):
    """Another process is writing to the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and lock it; if an error leaves it empty, it is removed again.

    The operating system holds the lock (``flock``), so it ends with the process. Raises ``FolderInUseError`` at once if
    another process is writing to the folder, ``FileExistsError`` if it is a file.
    """
    _check_folder(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        message = f"another process is writing to {folder}; wait for it, or choose another --output"
        raise FolderInUseError(message) from error
    try:
        with naming(folder):
            yield
    except BaseException:
        if not contents(folder):
            (folder / LOCK).unlink(missing_ok=True)
            if made:
                folder.rmdir()
        raise
    finally:
        lock.release()


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another --output")


def check_empty(folder: Path) -> None:
    """Raise ``FileExistsError`` if a folder is there and holds anything, or is a file."""
    _check_folder(folder)
    if folder.exists() and contents(folder):
        raise FileExistsError(f"{folder} is not empty; choose another --output")


def contents(folder: Path) -> list[str]:
    """Names of the files in a folder, without the lock and incomplete files."""
    return sorted(file.name for file in folder.iterdir() if file.name != LOCK and file.suffix != ".tmp")


def other_content_error(folder: Path, expected: str) -> FileExistsError:
    """The error for a folder that holds other files than an ``expected`` kind of folder."""
    names = contents(folder)
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return FileExistsError(
        f"{folder} is not empty and not a {expected}: it holds {shown}. Nothing was written; choose another --output"
    )
