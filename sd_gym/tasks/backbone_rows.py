"""The rows of a training split that a backbone is prepared on; the others are for policies.

A backbone has memorised the rows that it was prepared on, so the quality that a mask loses there says little about
other rows. ``sd-gym prepare`` takes a part of the training split, and saves which; policies learn on the rest.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_gym.data.instance import Instance
from sd_gym.files import map_arrays, write_arrays

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # of somebody's model
ROWS = "backbone_rows.safetensors"  # in the folder of a prepared backbone: ``hashes``, int64 [rows], sorted


def row_hashes(instances: Sequence[Instance]) -> NDArray[np.int64]:
    """Hashes of the texts of instances, int64 ``[n]``, without labels and outer spaces."""
    texts = (f"{instance.source.strip()}\0{(instance.source_pair or '').strip()}" for instance in instances)
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def backbone_part(instances: Sequence[Instance], rows: float) -> NDArray[np.bool_]:
    """Which instances of a training split a backbone is prepared on, bool ``[n]``: those with the lowest hashes.

    So the part depends neither on the order of the rows nor on a seed, and equal texts are in the same part. ``rows``
    is a share, up to 1.0, or above that a number; equal texts can make it a few more.

    Raises:
        ValueError: If ``rows`` is not above 0, or above the number of instances.
    """
    if not 0 < rows <= max(1, len(instances)):
        raise ValueError(
            f"rows: expected a share of the {len(instances)} training rows above 0, such as 0.6, or a number of them; "
            f"got {rows:g}"
        )
    hashes = row_hashes(instances)
    count = max(1, round(rows * len(hashes) if rows <= 1 else rows))
    return hashes <= np.sort(hashes)[count - 1]


def write_backbone_rows(folder: Path, hashes: NDArray[np.int64]) -> None:
    """Save in a backbone's folder which rows it was prepared on."""
    write_arrays(folder / ROWS, {"hashes": np.unique(hashes)})


def backbone_rows(backbone: str) -> NDArray[np.int64]:
    """Hashes of the rows that a backbone was prepared on, int64 ``[rows]``; empty if there is no file of them.

    Args:
        backbone: A folder, or an id of the Hugging Face hub, whose file is loaded.

    Raises:
        ValueError: If the file is damaged.
    """
    file = _file_of(backbone)
    if file is None:
        return np.empty(0, dtype=np.int64)
    hashes = map_arrays(file).get("hashes")
    if hashes is None or hashes.dtype != np.int64 or hashes.ndim != 1:
        raise ValueError(f"{file} is damaged: expected hashes, int64 [rows]; prepare the backbone again")
    return np.array(hashes)


def _file_of(backbone: str) -> Path | None:
    """The file with the rows of a backbone; ``None`` if it has none, or the hub cannot be reached."""
    if Path(backbone).exists() or not HUB_ID.fullmatch(backbone):
        file = Path(backbone) / ROWS
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file  # takes seconds, and most backbones are folders

    missing = dict.fromkeys(("missing_entries", "connection_errors", "gated_repo"), False)
    found = cached_file(backbone, ROWS, **{f"_raise_exceptions_for_{kind}": value for kind, value in missing.items()})
    return None if found is None else Path(found)
