"""A cascade: a cheap pass for all inputs, and a dense pass where its head is unsure (Viola and Jones 2001).

The dense pass goes on from the first sublayer that the cheap one skipped.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.baselines.early_exit import THRESHOLDS
from sd_gym.agents.baselines.search import greedy_path
from sd_gym.agents.baselines.static import StaticAgent, nested_masks, report_scored, searched_masks
from sd_gym.agents.learning.agent import NotApplicableError, OnRollout
from sd_gym.agents.learning.decisions import Version, policy_rows
from stable_baselines3.common.logger import Logger

from sd_gym.envs.spaces import flat_size
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.features import log_odds

SCALE = 0.01  # of the head's judgement in the hidden layers: tanh is nearly linear there
LEAST = -20.0  # margin at which every answer is accepted; judgements are at least -10


class Cascade(StaticAgent):
    """One mask for all inputs; if the head is less sure than a threshold, the pass goes on densely.

    For envs whose last stage is ``answer``. How sure the head is, is the first value of its judgement: for classes the
    log-odds of the most probable one. Operating points are masks with thresholds; the masks are those of a greedy path
    on policy rows, or of a run of ``static`` (``path``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.env.core.has_answer_stage:
            raise NotApplicableError(
                "a cascade goes on from an answer: it needs stages that end with answer, such as stages=[first, answer]"
            )
        self._channels = 1  # of tokens, which it does not read

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search a chain of nested masks on policy rows; ``total_steps`` is not used."""
        core = self.env.core
        if self.settings.path is not None:
            masks = np.unique(searched_masks(self.settings.path, core.nvec), axis=0)
        else:
            split, on_round = core.split("train"), partial(report_scored, on_rollout)
            masks = greedy_path(core, split, policy_rows(core), on_round, per=self.settings.per)
        self.masks = nested_masks(core, masks)

    def operating_points(self) -> list[Version]:
        """Each mask with each threshold."""
        policies = [self._accepting_policy(mask) for mask in self.masks if mask.any()]
        margins = [*_acceptance(log_odds(THRESHOLDS[THRESHOLDS < 1]))[::-1].tolist(), LEAST]
        return [Version(policy.with_margin(margin), margin, policy) for policy in policies for margin in margins]

    @torch.no_grad()
    def _accepting_policy(self, mask: NDArray) -> DecisionPolicy:
        """A policy that always chooses a mask ``[components]``, and accepts answers of positive log-odds."""
        core = self.env.core
        policy = self.new_policy(hidden=1)
        for values in policy.parameters():
            values.zero_()
        judged = flat_size(core.observation_space) - core.stage_observer.answer_size
        policy.body[0].weight[0, judged] = SCALE
        policy.body[2].weight[0, 0] = 1
        policy.head.weight[-2, 0] = 1 / SCALE  # of accepting
        return policy.with_mask(mask).eval()


def _acceptance(head_log_odds: NDArray) -> NDArray:
    """The policy's log-odds of accepting answers, from the head's log-odds ``[n]``."""
    return np.tanh(np.tanh(SCALE * head_log_odds)) / SCALE
