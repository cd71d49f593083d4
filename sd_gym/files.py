"""Files appear complete or not at all: written to a temporary name, then renamed. An error names the file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_gym.errors import one_line, short

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"BOOL": "?", "U8": "u1", "U16": "<u2", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


def write_text(file: Path, text: str) -> None:
    """Write a text; raises ``OSError`` if it cannot be written, as all that writes here."""
    _write(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: Any) -> None:
    """Write plain values, as ``as_json`` takes them."""
    write_text(file, as_json(value) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """An object that ``write_json`` wrote; raises ``OSError``, or ``ValueError`` if it is no JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged: expected JSON ({one_line(error)}); copy it again, or delete it"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object, got {short(value)}")
    return value


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; none shares its memory with another in the file."""
    from safetensors.torch import save_file

    apart = {name: value.contiguous().clone() for name, value in tensors.items()}
    _write(file, lambda temporary: save_file(apart, temporary))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors that ``write_tensors`` wrote; raises ``FileNotFoundError``, or ``ValueError`` if they are damaged."""
    from safetensors.torch import load_file

    with _sound(file):
        return load_file(file)


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write NumPy arrays as safetensors."""
    from safetensors.numpy import save_file

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    _write(file, lambda temporary: save_file(whole, temporary))


def map_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays that ``write_arrays`` wrote, mapped into memory: read where they are looked at, and not to be changed.

    Raises ``FileNotFoundError``, or ``ValueError`` if they are damaged.
    """
    from safetensors import safe_open

    with _sound(file), safe_open(file, "numpy"):  # compares what it says with its size
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
def _sound(file: Path) -> Iterator[None]:
    """Reading safetensors says what is wrong with the file."""
    from safetensors import SafetensorError

    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: expected safetensors ({one_line(error)}); copy it again") from error


def write_checkpoint(file: Path, value: dict[str, Any]) -> None:
    """Write tensors and plain values, nested, to go on from."""
    import torch

    _write(file, lambda temporary: torch.save(value, temporary))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """What ``write_checkpoint`` wrote: tensors and plain values, no code is run; raises ``ValueError`` if damaged."""
    import torch

    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:  # whose message tells how to run the code all the same
        expected = ValueError("expected tensors and plain values; it holds code, which is not run, or is cut off")
        raise ValueError(damaged_checkpoint(file, expected)) from error
    except Exception as error:  # the library raises errors of many kinds
        raise ValueError(damaged_checkpoint(file, error)) from error


def damaged_checkpoint(file: Path, error: Exception) -> str:
    """The message for a checkpoint that nothing can go on from."""
    return f"{file} is damaged, so nothing can go on from it ({one_line(error)}); delete it and begin again"


def sha256(file: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def as_json(value: Any) -> str:
    """JSON of plain values, numpy's numbers and arrays, and paths."""
    return json.dumps(value, indent=2, default=_plain)


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    from safetensors import SafetensorError

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    except (SafetensorError, RuntimeError) as error:  # what the libraries make of a disk's errors
        raise OSError(f"cannot write {file} ({one_line(error)}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
