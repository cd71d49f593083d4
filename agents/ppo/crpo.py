"""PPO with quality first: constraint-rectified policy optimisation."""

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.learning.agent import observation_layers
from sd_gym.agents.ppo.agent import PPOAgent, PPOSettings
from stable_baselines3 import PPO
from torch import nn
from torch.nn import functional as F

from sd_gym.policy import HIDDEN
from sd_gym.policy.observations import to_tensors

MEMORY = 512  # decisions over which the quality loss is averaged; more would detect a violation too late
CRITIC_EPOCHS = 4


class RectifiedPPO(PPO):
    """PPO that learns from the savings while the quality is kept, and from the quality alone while it is not.

    Constraint-rectified policy optimisation (CRPO, Xu, Liang and Lan 2021, algorithm 1). The library's own value head
    learns the savings, ``loss_critic`` the quality loss. The advantage is that of savings while the mean loss is within
    the limit, else that of less loss. The env's own reward is not used.
    """

    limit: float = 0.0  # mean quality that may be lost
    memory: int = MEMORY  # steps over which the quality loss is averaged
    savings: NDArray  # 1 - flops_ratio of the rollout, [steps, envs]; set before each update
    losses: NDArray  # quality_ref - quality of the rollout, [steps, envs]; set before each update
    mean_loss: float  # running mean of the quality loss; NaN before the first update

    def _setup_model(self) -> None:
        super()._setup_model()
        self.mean_loss = float("nan")
        layers = observation_layers(self.observation_space, HIDDEN)
        self.loss_critic = nn.Sequential(*layers, nn.Linear(HIDDEN, 1)).to(self.device)
        self.loss_optimizer = torch.optim.Adam(self.loss_critic.parameters(), lr=self.lr_schedule(1))

    def train(self) -> None:
        """One update for the savings or for the quality."""
        share = 1.0 if np.isnan(self.mean_loss) else min(1.0, self.losses.size / self.memory)
        before = 0.0 if np.isnan(self.mean_loss) else self.mean_loss
        self.mean_loss = before + share * (float(self.losses.mean()) - before)
        violated = self.mean_loss > self.limit
        buffer = self.rollout_buffer
        inputs = buffer.observations
        if isinstance(inputs, dict):
            inputs = {name: values.reshape(-1, *values.shape[2:]) for name, values in inputs.items()}
        observations = to_tensors(inputs, self.device)
        losses = torch.as_tensor(self.losses, dtype=torch.float32, device=self.device)

        def predicted() -> torch.Tensor:
            return self.loss_critic(observations)[..., 0].view_as(losses)

        with torch.no_grad():
            less_loss = predicted().cpu().numpy() - self.losses
        buffer.returns = self.savings.astype(np.float32)
        buffer.advantages = (less_loss if violated else self.savings - buffer.values).astype(np.float32)
        error = torch.zeros(())
        for _ in range(CRITIC_EPOCHS):
            error = F.mse_loss(predicted(), losses)
            self.loss_optimizer.zero_grad()
            error.backward()
            self.loss_optimizer.step()
        super().train()
        self.logger.record("train/mean_quality_loss", self.mean_loss)
        self.logger.record("train/violated", float(violated))
        self.logger.record("train/loss_critic_error", error.item())

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        return [*modules, "loss_critic", "loss_optimizer"], variables


class PPOLexSettings(PPOSettings):
    """Settings of PPO and of its constraint.

    Attributes:
        limit: Loss that sampled decisions may have at first, in multiples of epsilon; it falls linearly to 0. Sampled
            decisions lose more than the most probable ones, which are evaluated.
    """

    space: ClassVar = PPOSettings.space | {"limit": (0.5, 4.0)}

    limit: float = Field(1.5, gt=0, allow_inf_nan=False)


class PPOLexAgent(PPOAgent[PPOLexSettings]):
    """PPO that learns to save while the quality is kept, and to restore it while it is not: see ``RectifiedPPO``."""

    Settings = PPOLexSettings
    uses_reward = False
    Algorithm = RectifiedPPO
    algorithm: RectifiedPPO

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._standardise_encoders(self.algorithm.loss_critic)

    def before_update(self, infos: dict[str, NDArray]) -> None:
        """Pass the savings and the losses to the algorithm."""
        progress_left = self.algorithm._current_progress_remaining  # from 1 to 0, like the learning rate
        self.algorithm.limit = self.settings.limit * progress_left * self.env.config.reward.epsilon
        self.algorithm.memory = MEMORY * self.stages
        # Each step of a decision has the same return.
        self.algorithm.savings = np.repeat(1 - infos["flops_ratio"], self.stages, axis=0)
        self.algorithm.losses = np.repeat(infos["quality_ref"] - infos["quality"], self.stages, axis=0)

    def state(self) -> dict[str, Any]:
        """The agent's state and the running mean of the loss."""
        return {**super().state(), "mean_loss": self.algorithm.mean_loss}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state``."""
        super().load_state(state)
        self.algorithm.mean_loss = state["mean_loss"]
