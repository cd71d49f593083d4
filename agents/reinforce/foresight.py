"""A loss model: the quality that a decision is expected to lose on an input, learned from all that was scored."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.policy.networks import hidden_layers
from sd_gym.policy.token_encoder import TokenEncoder

HIDDEN = 128
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2
SELDOM = -3.0  # log-odds of a loss before anything was learned


class Foresight(nn.Module):
    """A network from an observation and a decision to the quality that is lost, and what it has learned from.

    Losses and gains are foreseen each by itself, as probabilities: where the backbone is often wrong, both may be
    likely at once.

    It takes observations of a ``space`` and decisions of components with sizes ``nvec``. Its ``outputs`` are that
    quality is lost, that it is gained, and more. Its encoder of tokens is wide, as its FLOPs do not count.
    """

    learning_starts: ClassVar[int] = 0  # decisions that are scored before the policy learns from what is foreseen

    def __init__(self, space: gym.Space, nvec: NDArray, outputs: int = 2) -> None:
        super().__init__()
        width, size = token_width(space), flat_size(space)
        self.token_encoder: nn.Module = nn.Identity()
        if width is not None:
            self.token_encoder = encoder = TokenEncoder(width, stage_size=size)
            size = encoder.size
        self._first = torch.from_numpy(np.cumsum([0, *nvec[:-1]]))  # column of each component's first choice
        self._columns = int(nvec.sum())
        layers = hidden_layers(size + self._columns, HIDDEN)
        last = nn.Linear(HIDDEN, outputs)
        self.network = nn.Sequential(*layers, last)
        nn.init.constant_(last.bias, SELDOM)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.rows = torch.zeros(0, dtype=torch.int64)  # of the instances that were scored
        self.decisions = torch.zeros(0, len(nvec), dtype=torch.int32)  # taken on them; of a table, numbers of masks
        self.lost = torch.zeros(0)  # quality that they lost, negative where they gained

    def remember(self, rows: NDArray, decisions: Tensor, lost: Tensor, seen: Tensor | None = None) -> None:
        """Add what was scored: rows ``[n]``, decisions ``[n, components]``, the quality lost ``[n]``.

        What was ``seen`` before the first layer can be seen again, so it is not remembered.
        """
        self.rows = torch.cat([self.rows, torch.from_numpy(rows)])
        self.decisions = torch.cat([self.decisions, decisions.to(torch.int32)])
        self.lost = torch.cat([self.lost, lost])

    def fit(self, observations: Tensor | dict[str, Tensor], drawn: Tensor) -> float:
        """One step of AdamW on the cross-entropy of what was remembered at ``drawn [n]``; returns that."""
        lost = self.lost[drawn]
        targets = torch.stack([lost, -lost], dim=1).clamp(0, 1)
        return self.step(F.binary_cross_entropy_with_logits(self(observations, self.decisions[drawn]), targets))

    def step(self, error: Tensor) -> float:
        """One step down an error; returns it."""
        self.optimizer.zero_grad()
        error.backward()
        self.optimizer.step()
        return error.item()

    def forward(self, observations: Tensor | dict[str, Tensor], decisions: Tensor) -> Tensor:
        """Log-odds ``[tries * n, 2]`` that quality is lost, and that it is gained, of observations of ``n`` instances.

        Row ``k * n + i`` of decisions ``[tries * n, components]`` is the ``k``-th on instance ``i``.
        """
        features = self.token_encoder(observations)
        chosen = torch.zeros(len(decisions), self._columns).scatter_(1, decisions.long() + self._first, 1.0)
        weight, bias = self.network.get_parameter("0.weight"), self.network.get_parameter("0.bias")
        of_features, of_chosen = weight.split([features.shape[1], self._columns], dim=1)
        observed = F.linear(features, of_features, bias)  # once for all tries on an instance
        hidden = F.linear(chosen, of_chosen).unflatten(0, (-1, len(observed))) + observed
        return self.network[1:](hidden.flatten(0, 1))

    @torch.no_grad()
    def loss(self, observations: Tensor | dict[str, Tensor], decisions: Tensor) -> Tensor:
        """The quality ``[tries * n]`` that is expected to be lost; see ``forward``."""
        losing, gaining = self(observations, decisions).sigmoid().unbind(dim=1)
        return losing - gaining

    def state(self) -> dict[str, Any]:
        """Weights, optimizer and memory."""
        return {
            "weights": self.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": [self.rows, self.decisions, self.lost],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rows, self.decisions, self.lost = state["memory"]
