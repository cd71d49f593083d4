"""Imitation: a search finds out how much of each training instance can be skipped, and the policy learns to foresee it.

A greedy search orders the candidates: a path of static masks from dense to nothing. All training instances go down this
path to a mask that hardly loses any; from there each one goes on as long as its own quality is kept, and the policy
learns by cross-entropy to skip what was skipped. Its logits are then estimates of "this input bears skipping down to
here", so a margin on them is a bound on the risk (TR-BERT, Ye et al. 2021, and Dr.LLM warm up on searched decisions). A
lucky wrong mask further down the path teaches nothing: the first loss ends the way.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.baselines.search import deepest_safe, static_path
from sd_gym.agents.baselines.static import backward_path, report
from sd_gym.agents.common.agent import Agent, LearnerSettings, OnRollout, initial_bias
from stable_baselines3.common.logger import Logger

from sd_gym.envs.split import Split
from sd_gym.policy import DecisionPolicy, write_json

BASE_LOSS = 0.25  # of epsilon: what all inputs together may lose where none is looked at
ORDER_INSTANCES = 1000  # that the path of static masks is searched on
SEARCHED = "searched.json"


class ImitationSettings(LearnerSettings):
    """Settings of imitation.

    Attributes:
        path: Folder of a run of ``static`` whose masks are the path, or of one of ``imitation`` whose whole search is
            taken over; ``None``: the path is searched on the training split.
        instances: Training instances that are tried on the masks of the path.
        epochs: Passes over the found decisions; a tenth of them is held out, and the best epoch on it is kept.
        batch_size: Of the supervised learning.
        weight_decay: Of AdamW.
    """

    path: Path | None = None
    instances: int = Field(5000, ge=20)
    epochs: int = Field(40, ge=1)
    batch_size: int = Field(128, ge=1)
    weight_decay: float = Field(1e-2, ge=0)


class ImitationAgent(Agent):
    """Searches decisions on the training split, then learns them by cross-entropy."""

    Settings = ImitationSettings
    settings: ImitationSettings
    searched: tuple[NDArray, NDArray]  # rows and decisions, once it has learned
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
        split, taken = core.split("train"), self.settings.path
        if taken is not None and (taken / SEARCHED).exists():
            self.searched = read_searched(taken, len(split), core.nvec)
        else:
            self.searched = self._search(split, on_rollout)
        rows, found = self.searched
        logger.record("search/flops_ratio", float(split.flops_ratio(rows, found).mean()))
        self._imitate(torch.from_numpy(core.observe(split, rows)), torch.from_numpy(found), logger)

    def _search(self, split: Split, on_rollout: OnRollout) -> tuple[NDArray, NDArray]:
        core = self.env.core
        rows = np.random.default_rng(self.seed).permutation(len(split))[: self.settings.instances]
        on_round = partial(report, on_rollout)
        if self.settings.path is None:
            path = static_path(core, split, rows[:ORDER_INSTANCES], on_round)
        else:
            path = backward_path(self.settings.path, core.nvec)
        return rows, np.stack(path)[deepest_safe(split, rows, path, core.config.epsilon * BASE_LOSS, on_round)]

    def save_extra(self, folder: Path) -> None:
        """Write ``searched.json``: the instances' rows in the training split, and what each of them bears."""
        rows, found = self.searched
        write_json(folder / SEARCHED, {"rows": rows.tolist(), "decisions": found.tolist()})

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


def read_searched(folder: Path, instances: int, nvec: NDArray) -> tuple[NDArray, NDArray]:
    """Rows of a training split of so many ``instances``, and decisions ``[n, components]`` that were found for them.

    Raises:
        ValueError: If they are those of another env.
    """
    searched = json.loads((folder / SEARCHED).read_text(encoding="utf-8"))
    rows, found = np.array(searched["rows"]), np.array(searched["decisions"])
    if found.shape[1:] != nvec.shape or rows.max() >= instances:
        raise ValueError(
            f"what was searched in {folder} has {found.shape[1]} components and rows up to {rows.max()}; expected "
            f"{len(nvec)} components, and rows of a training split of {instances}"
        )
    return rows, found
