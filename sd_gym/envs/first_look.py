"""What is seen before the first layer, where all is decided there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.episodes import Episodes
from sd_gym.envs.protocols import Core, Observations, Split

Array = NDArray


class FirstLook:
    """The ``StageLooks`` of a core with one stage: its observation, before the first layer."""

    def __init__(self, core: Core) -> None:
        self._core, self.space, self.judges = core, core.observation.space, False

    def observe(
        self, split: Split, rows: Array, stage: int, decisions: Array, resume_from: object
    ) -> tuple[Observations, None]:
        """Nothing is run; see ``StageLooks.observe``."""
        return self._core.observe(split, rows), None

    def episodes(self, core: Core, n: int, info_text: bool) -> Episodes:
        """A batch of episodes of one step."""
        return Episodes(core, n, info_text)

    def judging_flops(self, split: Split, rows: Array) -> Array:
        """Zeros, int64 ``[n]``: the head judges nothing."""
        return np.zeros(len(rows), dtype=np.int64)
