"""REINFORCE (Williams 1992) with a self-critical baseline (Rennie et al. 2017); reads from top to bottom.

For each drawn instance several decisions are sampled and scored together with the greedy decision, in one batched run
of the backbone. A sample's advantage is its reward minus the greedy decision's: what the policy would do without
exploring is the bar, so the gradient vanishes where sampling brings nothing new.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from pydantic import Field
from sd_gym.agents.common.agent import Agent, LearnerSettings, OnRollout, Rollout, initial_bias
from stable_baselines3.common.logger import Logger
from torch.distributions import Categorical

from sd_gym.policy import DecisionPolicy


class ReinforceSettings(LearnerSettings):
    """Settings of REINFORCE; a rollout scores ``num_envs * (samples + 1)`` decisions.

    Rollouts are small, as each is used once, and the entropy bonus keeps the policy from being certain before it looks
    at its input.
    """

    num_envs: int = Field(16, ge=1)
    samples: int = Field(4, ge=1)
    entropy: float = Field(0.2, ge=0)


class ReinforceAgent(Agent):
    """REINFORCE: ascends ``E[(r(a) - r(greedy)) * grad log pi(a|x)]``."""

    Settings = ReinforceSettings
    settings: ReinforceSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.network = self._new_policy()
            for layer in self.network.body:
                if isinstance(layer, torch.nn.Linear):  # as Stable-Baselines3 does: the features start at full size
                    torch.nn.init.orthogonal_(layer.weight, gain=2**0.5)
                    torch.nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.network.head.weight.mul_(0.01)  # starts alike for all inputs
            self.network.head.bias.copy_(initial_bias(self.env.core.nvec, self.settings.initial_skip_rate))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.settings.learning_rate)
        self.random = np.random.default_rng(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn from at least ``total_steps`` scored decisions, the greedy ones included."""
        core, settings, batch = self.env.core, self.settings, self.env.num_envs
        split = core.split(core.config.split)
        started, steps = time.monotonic(), 0
        while steps < total_steps:
            rows = self.random.integers(len(split), size=batch)
            observations = torch.from_numpy(core.observe(split, rows))
            logits = self.network(observations)
            greedy = torch.stack([choice.argmax(dim=1) for choice in logits], dim=1)
            sampled = [self._sample(choice) for choice in logits]  # one [samples, batch] a component
            decisions = torch.stack(sampled, dim=2).flatten(0, 1)
            outcome = core.score(split, np.tile(rows, settings.samples + 1), torch.cat([greedy, decisions]).numpy())
            rewards = torch.from_numpy(outcome.reward).float().view(settings.samples + 1, batch)
            advantage = rewards[1:] - rewards[:1]
            advantage = advantage / (advantage.std() + 1e-6)

            choices = [Categorical(logits=choice) for choice in logits]
            log_prob = sum(choice.log_prob(actions) for choice, actions in zip(choices, sampled, strict=True))
            entropy = sum(choice.entropy() for choice in choices).mean()
            loss = -(advantage * log_prob).mean() - settings.entropy * entropy
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()

            steps += len(decisions) + len(greedy)
            drawn = slice(batch, None)  # as for the other agents: what was explored
            infos = {name: getattr(outcome, name)[drawn] for name in ("quality", "quality_ref", "flops_ratio")}
            infos["is_success"] = outcome.cost[drawn] == 0
            rollout = Rollout(steps, outcome.reward[drawn], infos)
            rollout.record(logger)
            logger.record("rollout/ep_rew_mean", float(rollout.rewards.mean()))
            logger.record("rollout/ep_len_mean", 1.0)
            logger.record("rollout/success_rate", float(infos["is_success"].mean()))
            logger.record("train/loss", loss.item())
            logger.record("train/entropy_loss", -entropy.item())
            logger.record("train/learning_rate", settings.learning_rate)
            logger.record("time/fps", int(steps / (time.monotonic() - started)))
            logger.dump(steps)
            on_rollout(rollout)

    def policy(self) -> DecisionPolicy:
        """A copy of the network."""
        copy = self._new_policy()
        copy.load_state_dict(self.network.state_dict())
        return copy.eval()

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        """``[samples, batch]`` draws from logits ``[batch, size]``, by this agent's own generator."""
        probabilities = logits.detach().softmax(dim=1)
        drawn = torch.multinomial(probabilities, self.settings.samples, replacement=True, generator=self.generator)
        return drawn.T
