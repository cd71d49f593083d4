"""Standardised observations and their principal components, which large tables store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from sd_gym.files import map_arrays, write_arrays

if TYPE_CHECKING:
    from torch import Tensor

Values = TypeVar("Values", NDArray, "Tensor")
OBSERVATION_LIMIT = 10.0  # largest absolute value in an observation
LEAST_DEVIATION = 1e-6


def deviation_of(deviation: NDArray) -> NDArray:
    """Deviations to divide by, float32; 1 for a constant feature, which is then 0."""
    return np.where(deviation > LEAST_DEVIATION, deviation, 1.0).astype(np.float32)


def standardised(features: Values, mean: Values, deviation: Values) -> Values:
    """Features ``[n, ...]`` by their mean and deviation on the training split, each within ``OBSERVATION_LIMIT``."""
    return ((features - mean) / deviation).clip(-OBSERVATION_LIMIT, OBSERVATION_LIMIT)


class Projection(NamedTuple):
    """Principal components of standardised observations, each divided by its deviation on the training split."""

    mean: NDArray  # of the observations, float32 ``[features]``
    components: NDArray  # float32 ``[size, features]``
    explained: NDArray  # share of the variance that each component explains, float32 ``[size]``

    def __call__(self, observations: NDArray) -> NDArray:
        """Reduce observations ``[n, features]`` to float32 ``[n, size]``, limited to ``OBSERVATION_LIMIT``.

        They are rounded to float16, as tables store them. Everything before is float64, so results do not depend on
        the batch.
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


def fit_projection(observations: NDArray, size: int, before: int = 0, after: int = 0) -> Projection:
    """Fit scikit-learn's PCA on the observations ``[n, features]`` of a training split.

    A component that is constant there is not scaled. The first ``before`` and last ``after`` features are not reduced.
    """
    from scipy.linalg import block_diag
    from sklearn.decomposition import PCA

    reduced = np.asarray(observations, dtype=np.float64)[:, before : observations.shape[1] - after]
    pca = PCA(size, svd_solver="full").fit(reduced)
    components = pca.components_ / deviation_of(np.sqrt(pca.explained_variance_))[:, None]
    arrays = (
        np.pad(pca.mean_, (before, after)),
        np.asarray(block_diag(np.eye(before), components, np.eye(after))),
        np.pad(pca.explained_variance_ratio_, (before, after)),
    )
    return Projection(*(values.astype(np.float32) for values in arrays))


def read_projection(file: Path) -> Projection:
    """Read what ``Projection.save`` wrote; raises ``FileNotFoundError``, or ``ValueError`` if it is damaged."""
    arrays = map_arrays(file)
    try:
        return Projection(**arrays)
    except TypeError as error:
        raise ValueError(f"{file} is damaged: expected {', '.join(Projection._fields)}; copy it again") from error
