"""Folders that a command writes to: nobody else's files in them, and no other process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

MARKER = "sd_gym"  # the key under which our files name the version that wrote them
LOCK = ".lock"
SHOWN = 5


class FolderInUseError(FileExistsError):
    """Another process is writing to a folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, and keep it from other processes meanwhile; one that is left empty by an error is removed again.

    The operating system holds the lock (``flock``), so a process that is killed leaves none behind. Raises
    ``FolderInUseError`` at once if another process is writing to the folder, ``FileExistsError`` if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another --output")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        message = f"another process is writing to {folder}; wait for it, or choose another --output"
        raise FolderInUseError(message) from error
    try:
        yield
    except BaseException:
        if not contents(folder):
            (folder / LOCK).unlink(missing_ok=True)
            if made:
                folder.rmdir()
        raise
    finally:
        lock.release()


def contents(folder: Path) -> list[str]:
    """What lies in a folder, by name; not the lock, nor what was cut off while it was written."""
    return sorted(file.name for file in folder.iterdir() if file.name != LOCK and file.suffix != ".tmp")


def foreign(folder: Path, expected: str) -> FileExistsError:
    """The error for a folder that holds something else."""
    names = contents(folder)
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return FileExistsError(
        f"{folder} is not empty and no {expected}: it holds {shown}. Nothing was written; choose another --output"
    )
