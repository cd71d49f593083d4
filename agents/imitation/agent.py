"""Imitation: a search finds a cheap good decision for each training instance, and the policy learns to make it.

What reinforcement learning finds by trial, a search finds by looking at the answer (TR-BERT, Ye et al. 2021, warms up so). A
lucky wrong path, such as guessing one of two classes, would teach nothing, so a decision is good only if the reference
stays likely under it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.baselines.search import order_of, search_each, static_path
from sd_gym.agents.baselines.static import report
from sd_gym.agents.common.agent import Agent, LearnerSettings, OnRollout, initial_bias
from stable_baselines3.common.logger import Logger

from sd_gym.policy import DecisionPolicy

ORDER_INSTANCES = 200  # that the order in which the search tries the components is found on


class ImitationSettings(LearnerSettings):
    """Settings of imitation.

    Attributes:
        instances: Training instances that are searched.
        threshold: Least likelihood of the reference under a good decision, over the dense backbone's.
        width: Decisions kept for each instance during the search.
        epochs: Passes over the found decisions; a tenth of them is held out, and the best epoch on it is kept.
        batch_size: Of the supervised learning.
        weight_decay: Of AdamW.
    """

    instances: int = Field(2000, ge=20)
    threshold: float = Field(0.8, gt=0, le=1)
    width: int = Field(1, ge=1)
    epochs: int = Field(60, ge=1)
    batch_size: int = Field(128, ge=1)
    weight_decay: float = Field(1e-3, ge=0)


class ImitationAgent(Agent):
    """Searches decisions on the training split, then learns them by cross-entropy."""

    Settings = ImitationSettings
    settings: ImitationSettings
    validates = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.network = self._new_policy()
        with torch.no_grad():
            if self.settings.start is not None:
                self.network.load_state_dict(self._start_policy(self.settings.start).state_dict())
            else:
                self.network.head.weight.mul_(0.01)
                self.network.head.bias.copy_(initial_bias(self.env.core.nvec, self.settings.initial_skip_rate))

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search and learn; it takes as many decisions as it takes."""
        core = self.env.core
        split = core.split("train")
        random = np.random.default_rng(self.seed)
        rows = random.permutation(len(split))[: self.settings.instances]
        scored = 0

        def on_round(more: int) -> None:
            report(on_rollout, scored + more)

        path = static_path(core, split, rows[:ORDER_INSTANCES], on_round)
        _, dense = split.quality_and_likelihood(np.arange(len(split)), np.zeros((len(split), len(core.nvec)), int))

        def good(rows: NDArray, decisions: NDArray) -> NDArray:
            _, likelihood = split.quality_and_likelihood(rows, decisions)
            return likelihood >= self.settings.threshold * dense[rows]

        found = search_each(core, split, rows, order_of(path), good, on_round, width=self.settings.width)
        logger.record("search/flops_ratio", float(split.flops_ratio(rows, found).mean()))
        self._imitate(torch.from_numpy(core.observe(split, rows)), torch.from_numpy(found), logger)

    def policy(self) -> DecisionPolicy:
        """A copy of the network."""
        return self.network.with_weights(self.network.state_dict())

    def offers(self) -> list[DecisionPolicy]:
        """The policy."""
        return [self.policy()]

    def _imitate(self, observations: torch.Tensor, decisions: torch.Tensor, logger: Logger) -> None:
        settings, held_out = self.settings, max(1, len(observations) // 10)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

        def loss(rows: torch.Tensor | slice) -> torch.Tensor:
            choices = decisions[rows]
            log_probs = self.network.log_probs(self.network(observations[rows]), choices)
            return -sum(log_prob.gather(1, choices[:, [i]]).mean() for i, log_prob in enumerate(log_probs))

        lowest, best = float("inf"), self.network.state_dict()
        for epoch in range(settings.epochs):
            order = held_out + torch.randperm(len(observations) - held_out, generator=generator)
            for rows in order.split(settings.batch_size):
                optimizer.zero_grad()
                loss(rows).backward()
                optimizer.step()
            with torch.no_grad():
                error = loss(slice(0, held_out)).item()
            logger.record("imitation/held_out_loss", error)
            logger.dump(epoch)
            if error < lowest:
                lowest, best = error, {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(best)
