"""What a policy takes along when it leaves its env: all that deciding needs beside its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sd_gym.config import EnvConfig
from sd_gym.envs.table_files import EXPORT
from sd_gym.files import write_arrays
from sd_gym.policy.protected_tokens import ProtectedTokens
from sd_gym.projection import Projection

Array = NDArray


class Export(NamedTuple):
    """What a policy takes along; ``SkipPolicy`` says of most fields what they are."""

    env: EnvConfig  # of a table, of the env that the table is of
    backbone: dict[str, Any]  # as the artefact's card has it
    mean: Array  # of what is observed, as are deviation and, where tokens are observed at stages, of_tokens
    deviation: Array
    rarity: Array | None
    protection: ProtectedTokens | None
    masks: Array | None = None  # of a table, as is projection
    projection: Projection | None = None
    of_tokens: tuple[Array, Array] | None = None
    ranking_costs_flops: bool = False
    context: ProtectedTokens | None = None

    def write(self, folder: Path) -> None:
        """Write to a table what its description has no place for."""
        arrays = {"mean": self.mean, "deviation": self.deviation, "rarity": self.rarity}
        write_arrays(folder / EXPORT, {name: values for name, values in arrays.items() if values is not None})
