"""Files are written completely or not at all (to a temporary name, then renamed). Errors name the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_gym.errors import one_line, short

if TYPE_CHECKING:
    from torch import Tensor

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_DTYPES = {"BOOL": "?", "U8": "u1", "U16": "<u2", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


def write_text(file: Path, text: str) -> None:
    """Write a text."""
    write_file(file, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def write_json(file: Path, value: Any) -> None:
    """Write plain values as JSON; see ``as_json``."""
    write_text(file, as_json(value) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises ``OSError``, or ``ValueError`` if the file is not a JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: expected JSON ({one_line(error)}); copy it again or delete it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object, got {short(value)}")
    return value


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; tensors that share memory are written separately."""
    from safetensors.torch import save_file

    copies = {name: value.contiguous().clone() for name, value in tensors.items()}
    write_file(file, lambda temporary: save_file(copies, temporary))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read safetensors; raises ``FileNotFoundError``, or ``ValueError`` if the file is damaged."""
    from safetensors.torch import load_file

    with _checked(file):
        return load_file(file)


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write NumPy arrays as safetensors."""
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_file(file, lambda temporary: save_file(contiguous, temporary))


def map_arrays(file: Path) -> dict[str, np.ndarray]:
    """Map the arrays of a safetensors file into memory, read-only; their pages are read when they are used.

    Raises ``FileNotFoundError``, or ``ValueError`` if the file is damaged.
    """
    from safetensors import safe_open

    with _checked(file):
        with safe_open(file, "numpy"):  # compares the header with the file's size
            pass
        memory = np.memmap(file, np.uint8, "r")
        start = 8 + int(memory[:8].view("<u8")[0])
        header = json.loads(memory[8:start].tobytes())
        header.pop("__metadata__", None)
        return {
            name: np.ndarray(tuple(array["shape"]), _DTYPES[array["dtype"]], memory, start + array["data_offsets"][0])
            for name, array in header.items()
        }


@contextmanager
def _checked(file: Path) -> Iterator[None]:
    """Turn errors of reading a safetensors file into errors that name it."""
    from safetensors import SafetensorError

    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    try:
        yield
    except (SafetensorError, KeyError) as error:  # a type that is not known is a KeyError
        raise ValueError(f"{file} is damaged: expected safetensors ({one_line(error)}); copy it again") from error


def write_checkpoint(file: Path, value: dict[str, Any]) -> None:
    """Write nested tensors and plain values."""
    import torch

    write_file(file, lambda temporary: torch.save(value, temporary))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read what ``write_checkpoint`` wrote, without running code; raises ``ValueError`` if it is damaged."""
    import torch

    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:  # whose message says how to run the code
        expected = ValueError("expected tensors and plain values; it is cut off, or contains code, which is not run")
        raise ValueError(damaged_checkpoint(file, expected)) from error
    except Exception as error:  # the library raises errors of many kinds
        raise ValueError(damaged_checkpoint(file, error)) from error


def damaged_checkpoint(file: Path, error: Exception) -> str:
    """The message for a damaged checkpoint."""
    return f"{file} is damaged, so it cannot be resumed ({one_line(error)}); delete it and begin again"


def file_states(path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time in ns and size of a file, or of each file in a folder; they change when a file is written again.

    Of its subfolders the first level counts, where copies of hub data sets have their files. Empty if there is no such
    path, as for an id of the Hugging Face hub.
    """
    path, found = Path(path), []
    for file in sorted([*path.glob("*"), *path.glob("[!.]*/*")]) if path.is_dir() else [path]:
        with suppress(FileNotFoundError):  # another program may have removed it
            status = file.stat()
            if S_ISREG(status.st_mode):
                found.append((file.name, status.st_mtime_ns, status.st_size))
    return tuple(found)


def sha256(file: Path) -> str:
    """The SHA-256 hash of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """The SHA-256 hash of plain values, in hexadecimal digits; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> str:
    """JSON of plain values, numpy's numbers and arrays, and paths."""
    return json.dumps(value, indent=2, default=_plain)


def write_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file by a function of a path; raises ``OSError`` on failure, as all functions here that write."""
    from safetensors import SafetensorError

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        with naming(file):
            write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(temporary, file)
    except (SafetensorError, RuntimeError) as error:  # how the libraries report errors of the disk
        raise OSError(f"cannot write {file} ({one_line(error)}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Add a file or folder to the error of a full disk, which names none."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(place)
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
