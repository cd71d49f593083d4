"""Standardised observations, and those reduced to their principal components, as a table of many instances has them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_gym.files import map_arrays, write_arrays

Array = NDArray
OBSERVATION_LIMIT = 10.0  # of each number of an observation
LEAST_DEVIATION = 1e-6


def deviation_of(deviation: Array) -> Array:
    """Where a feature never changes in training it says nothing: dividing by 1 leaves it at 0."""
    return np.where(deviation > LEAST_DEVIATION, deviation, 1.0).astype(np.float32)


class Projection(NamedTuple):
    """Principal components of standardised observations, each divided by its deviation on the training split."""

    mean: Array  # of the observations, float32 ``[features]``
    components: Array  # float32 ``[size, features]``
    explained: Array  # the share of the variance that each component has, float32 ``[size]``

    def __call__(self, observations: Array) -> Array:
        """Observations ``[n, features]`` reduced, float32 ``[n, size]``, each number within ``OBSERVATION_LIMIT``.

        They are rounded to float16, which a table keeps; since all before is float64, it does not matter how many are
        reduced together.
        """
        reduced = (np.asarray(observations, dtype=np.float64) - self.mean) @ self.components.T.astype(np.float64)
        return np.clip(reduced, -OBSERVATION_LIMIT, OBSERVATION_LIMIT).astype(np.float16).astype(np.float32)

    @property
    def flops(self) -> int:
        """FLOPs of reducing one observation, 2 per multiply-add."""
        return 2 * self.components.size

    def save(self, file: Path) -> None:
        """Write it as safetensors."""
        write_arrays(file, self._asdict())


def fit_projection(observations: Array, size: int, before: int = 0, after: int = 0) -> Projection:
    """Scikit-learn's PCA, fitted on the observations ``[n, features]`` of a training split.

    A component that does not vary there says nothing, and stays as small as it is. So many numbers ``before`` and
    ``after`` what is reduced stay as they are.
    """
    from scipy.linalg import block_diag
    from sklearn.decomposition import PCA

    reduced = np.asarray(observations, dtype=np.float64)[:, before : observations.shape[1] - after]
    found = PCA(size, svd_solver="full").fit(reduced)
    components = found.components_ / deviation_of(np.sqrt(found.explained_variance_))[:, None]
    exact = (
        np.pad(found.mean_, (before, after)),
        np.asarray(block_diag(np.eye(before), components, np.eye(after))),
        np.pad(found.explained_variance_ratio_, (before, after)),
    )
    return Projection(*(values.astype(np.float32) for values in exact))


def read_projection(file: Path) -> Projection:
    """What ``Projection.save`` wrote; raises ``FileNotFoundError``, or ``ValueError`` if it is damaged."""
    arrays = map_arrays(file)
    try:
        return Projection(**arrays)
    except TypeError as error:
        raise ValueError(f"{file} is damaged: expected {', '.join(Projection._fields)}; copy it again") from error
