"""The oracle: the cheapest good decision of each test instance, found by looking at the answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.baselines.search import beam_search, can_try_all, exhaustive_search, greedy_path, path_steps
from sd_gym.agents.learning.agent import AgentSettings, OnRollout, PrivilegedAgent
from sd_gym.agents.learning.decisions import SplitDecisions, Version
from stable_baselines3.common.logger import Logger

from sd_gym.envs.protocols import Split

ORDER_INSTANCES = 200  # of the validation split, that the order of a beam search is found on


class OracleSettings(AgentSettings):
    """Settings of the oracle.

    Attributes:
        width: Decisions kept for each instance, where a beam is searched.
    """

    width: int = Field(4, ge=1)


class Oracle(PrivilegedAgent[OracleSettings]):
    """All decisions are tried where they are few enough, else a beam of them.

    A lucky wrong way counts as right, such as guessing one of two classes: a bound, and no target.
    """

    Settings = OracleSettings
    draws = selects = False

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """There is nothing to learn."""

    def operating_points(self) -> list[Version]:
        """Itself."""
        return [Version(self)]

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """The cheapest decision of each row whose quality is at least the dense one's; deciding costs nothing."""
        core = self.env.core

        def good(rows: NDArray, decisions: NDArray) -> NDArray:
            outcome = core.score(split, rows, decisions)
            return outcome.quality >= outcome.quality_ref

        if can_try_all(core.nvec, len(rows)):
            decisions = exhaustive_search(core, split, rows, good, _ignore)
        else:
            validation = core.split("validation")
            few = np.arange(min(ORDER_INSTANCES, len(validation)))
            order = path_steps(greedy_path(core, validation, few, _ignore))
            decisions = beam_search(core, split, rows, order, good, _ignore, width=self.settings.width)
        return SplitDecisions(decisions, np.zeros(len(rows)))


def _ignore(scored: int) -> None:
    """The search reports nothing."""
