"""Controls that learn nothing: dense, every other layer, or random decisions."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from sd_gym.agents.learning.agent import Agent, AgentSettings, NotApplicableError, OnRollout, SettingsT, decision_logits
from stable_baselines3.common.logger import Logger

from sd_gym.policy import DecisionPolicy

CERTAIN = 0.99


class RateSettings(AgentSettings):
    """Settings of the controls that skip at random.

    Attributes:
        rate: Probability of skipping each switch.
    """

    rate: float = Field(0.2, gt=0, lt=1)


class _FixedPolicyAgent(Agent[SettingsT]):
    selects = validates = draws = False
    staged = is_control = True

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Do nothing."""


class DenseAgent(_FixedPolicyAgent[AgentSettings]):
    """A control that skips nothing."""

    def policy(self) -> DecisionPolicy:
        """Everything runs."""
        nvec = self.env.core.nvec
        return self._constant_policy(decision_logits(nvec, np.zeros_like(nvec), CERTAIN))


class EveryOtherAgent(_FixedPolicyAgent[AgentSettings]):
    """Skips every other layer; the first one of each stack runs (LayerDrop, Fan et al. 2020, section 4)."""

    def policy(self) -> DecisionPolicy:
        """The same layers for every input."""
        core = self.env.core
        odd = [switch.index % 2 for switch in core.backbone.board.switches]
        if len(core.switch_names) < len(odd):
            raise NotApplicableError("every-other decides on each switch, but this table has only some masks")
        mask = np.minimum([*odd, 0], core.mask_nvec - 1)  # switches that are no candidates always run
        return self._constant_policy(decision_logits(core.nvec, core.from_masks(mask[None])[0], CERTAIN))


class RandomAgent(_FixedPolicyAgent[RateSettings]):
    """Skips each switch with probability ``rate``, for every input; the draws do not depend on the seed."""

    Settings = RateSettings
    noise: ClassVar[Literal["random", "hash"]] = "random"

    def policy(self) -> DecisionPolicy:
        """The same probabilities for every input."""
        nvec = self.env.core.nvec
        return self._constant_policy(decision_logits(nvec, np.zeros_like(nvec), 1 - self.settings.rate), self.noise)


class HashAgent(RandomAgent):
    """Like ``random``, but the same input always gets the same decision: decisions vary without any knowledge."""

    noise = "hash"
