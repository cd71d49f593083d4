"""PPO with a penalty that learns to keep the mean quality."""

from typing import Any

from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.ppo.agent import PPOAgent, PPOSettings

from sd_gym.envs.wrappers import LagrangianVectorWrapper
from sd_gym.objectives import MULTIPLIER_RATE


class PPOLagrangianSettings(PPOSettings):
    """Settings of PPO and of its multiplier.

    Attributes:
        multiplier_rate: Change of the multiplier per decision; it starts at the env's ``penalty``.
        limit: Share of the env's epsilon that may be lost: a policy that loses all of it cannot be shown to keep the
            quality.
    """

    multiplier_rate: float = Field(MULTIPLIER_RATE, ge=0)
    limit: float = Field(0.5, gt=0, le=1)


class PPOLagrangianAgent(PPOAgent[PPOLagrangianSettings]):
    """PPO on a Lagrangian: savings minus a penalty for lost quality (Ray, Achiam and Amodei 2019, section 5).

    The penalty is a multiplier. It rises while the mean loss is above its limit and falls while it is below. The env's
    own reward is not used.
    """

    Settings = PPOLagrangianSettings
    uses_reward = False

    def _reward_env(self) -> VectorEnv:
        self._wrapper = LagrangianVectorWrapper(self.env, rate=self.settings.multiplier_rate)
        self._wrapper.lagrangian.epsilon *= self.settings.limit
        return self._wrapper

    @property
    def multiplier(self) -> float:
        """The current multiplier."""
        return self._wrapper.lagrangian.multiplier

    def before_update(self, infos: dict[str, NDArray]) -> None:
        """Log the multiplier."""
        self.algorithm.logger.record("train/multiplier", self.multiplier)

    def state(self) -> dict[str, Any]:
        """The agent's state and the multiplier."""
        return {**super().state(), "multiplier": self.multiplier}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state``."""
        super().load_state(state)
        self._wrapper.lagrangian.multiplier = state["multiplier"]
