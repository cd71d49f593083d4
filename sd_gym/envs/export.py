"""What a policy needs outside of its env, besides its network."""

from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray as Array

from sd_gym.config import EnvConfig
from sd_gym.envs.table_files import EXPORT
from sd_gym.files import write_arrays
from sd_gym.policy.token_rule import TokenRule
from sd_gym.projection import Projection


class Export(NamedTuple):
    """What a policy needs outside of its env; see ``SkipPolicy`` for most fields."""

    env: EnvConfig  # for a table, the original env's
    backbone: dict[str, Any]  # as in the artefact's card
    mean: Array  # mean of the observations
    deviation: Array
    rarity: Array | None
    protection: TokenRule | None
    masks: Array | None = None  # only for a table, like ``projection``
    projection: Projection | None = None
    token_statistics: tuple[Array, Array] | None = None  # mean and deviation, if several stages show tokens
    ranking_costs_flops: bool = False
    context: TokenRule | None = None

    def write(self, folder: Path) -> None:
        """Write the arrays to the folder of a table; the rest is in its ``table.json``."""
        arrays = {"mean": self.mean, "deviation": self.deviation, "rarity": self.rarity}
        write_arrays(folder / EXPORT, {name: values for name, values in arrays.items() if values is not None})
