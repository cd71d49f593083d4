"""Files appear complete or not at all: they are written to a temporary name, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def write_text(file: Path, text: str) -> None:
    """Write a text."""
    temporary = _temporary(file)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def write_json(file: Path, value: Any) -> None:
    """Write plain values, as ``as_json`` takes them."""
    write_text(file, as_json(value) + "\n")


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; none shares its memory with another in the file."""
    from safetensors.torch import save_file

    temporary = _temporary(file)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, temporary)
    os.replace(temporary, file)


def as_json(value: Any) -> str:
    """JSON of plain values, numpy's numbers and arrays, and paths."""
    return json.dumps(value, indent=2, default=_plain)


def _temporary(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(file.name + ".tmp")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
