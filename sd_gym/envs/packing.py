"""Arrays of a table as they are written: merged from chunks, without repetitions, in the smallest types."""

from typing import Any

import numpy as np
from numpy.typing import NDArray as Array


def merged(parts: list[dict[str, Array]], name: str, n: int) -> Array:
    """The arrays of all chunks as one, ``[n, ...]``, in the order of the rows."""
    dtype = np.result_type(*(part[name].dtype for part in parts))  # each chunk has the smallest of its own
    whole = np.empty((n, *parts[0][name].shape[1:]), dtype)
    for part in parts:
        whole[part["rows"]] = part[name]
    return whole


def packed_costs(always: Array, switched: Array) -> dict[str, Array]:
    """FLOPs ``[n, levels]`` and ``[n, levels, switches]`` without repetitions, and the row of each instance in them."""
    n, levels, switches = switched.shape
    both = np.concatenate([always[:, :, None], switched], axis=2).reshape(n, -1)
    different, number = np.unique(both, axis=0, return_inverse=True)
    different = different.reshape(len(different), levels, 1 + switches)
    return {"costs": smallest(number.ravel()), "always": different[:, :, 0], "switched": different[:, :, 1:]}


def smallest(values: Any) -> Array:
    """Numbers ``[n, ...]`` in the smallest type that represents them exactly."""
    values = np.asarray(values)
    floats = np.float16, np.float32, np.float64
    kinds = {"b": (np.bool_,), "f": floats}.get(values.dtype.kind, (np.uint8, np.uint16, np.int64))
    with np.errstate(over="ignore"):
        small = map(values.astype, kinds)
        return next(array for array in small if np.array_equal(array, values, equal_nan=values.dtype.kind == "f"))


def packed_qualities(parts: list[dict[str, Array]], n: int, masks: int) -> dict[str, Array]:
    """Qualities ``[n, masks]`` as indices into their different values: bits if there are two; too many are float32."""
    values = np.unique(np.concatenate([np.unique(part["quality"]) for part in parts])).astype(np.float64)
    if len(values) > 2**16:
        return {"quality": merged(parts, "quality", n).astype(np.float32)}
    quality = np.empty((n, masks), dtype=np.uint8 if len(values) <= 2**8 else np.uint16)
    for part in parts:
        quality[part["rows"]] = np.searchsorted(values, part["quality"])
    return {"quality": np.packbits(quality, axis=1) if len(values) <= 2 else quality, "quality_values": values}
