"""The oracle: the cheapest good decision of each test instance, chosen with the answers."""

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.baselines.search import beam_search, can_try_all, exhaustive_search, greedy_path, path_steps
from sd_gym.agents.learning.agent import AgentSettings, PrivilegedAgent
from sd_gym.agents.learning.decisions import SplitDecisions, Version

from sd_gym.envs.exact import outcomes_of_all
from sd_gym.envs.protocols import Split
from sd_gym.envs.table import TableSplit

ORDER_INSTANCES = 200  # validation instances, to find the order of a beam search
WIDTH = 4  # of the beam


class Oracle(PrivilegedAgent[AgentSettings]):
    """Tries all decisions of a table, or of a backbone if they are few enough, else a beam of them.

    Answers that are right by luck count as right, which is common with two classes. It bounds policies that lose on no
    instance. One that loses on some and gains on others can use fewer FLOPs at the same mean quality.
    """

    draws = selects = False

    def operating_points(self) -> list[Version]:
        """The oracle itself."""
        return [Version(self)]

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """The cheapest decision of each row whose quality is at least the dense one's; deciding costs nothing."""
        core = self.env.core

        def good(rows: NDArray, decisions: NDArray) -> NDArray:
            outcome = core.score(split, rows, decisions)
            return outcome.quality >= outcome.quality_ref

        if isinstance(split, TableSplit):
            known = [np.where(loss <= 0, flops, np.inf).argmin(axis=1) for _, loss, flops in outcomes_of_all(split)]
            decisions = split.core.from_masks(split.core.masks[np.concatenate(known)[rows]])
        elif can_try_all(core.nvec, len(rows)):
            decisions = exhaustive_search(core, split, rows, good)
        else:
            validation = core.split("validation")
            few = np.arange(min(ORDER_INSTANCES, len(validation)))
            order = path_steps(greedy_path(core, validation, few))
            decisions = beam_search(core, split, rows, order, good, width=WIDTH)
        return SplitDecisions(decisions, np.zeros(len(rows)))
