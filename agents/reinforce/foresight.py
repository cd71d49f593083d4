"""A loss model: the expected quality loss of a decision on an input, learned from all scored decisions."""

from typing import Any, ClassVar

import gymnasium as gym
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.policy.choices import first_columns
from sd_gym.policy.networks import hidden_layers
from sd_gym.policy.token_encoder import TokenEncoder

HIDDEN = 128
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2
INITIAL_LOG_ODDS = -3.0  # of a loss, which is rare


class Foresight(nn.Module):
    """A network from an observation and a decision to the probabilities of a loss and a gain, and its training data.

    Loss and gain are separate outputs: where the backbone is often wrong, both may be likely.

    It takes observations of a ``space`` and decisions of components with sizes ``nvec``. Its first ``outputs`` are the
    log-odds of a loss and of a gain. Its token encoder is wide, as its FLOPs do not count.
    """

    learning_starts: ClassVar[int] = 0  # scored decisions before the policy learns from predictions

    def __init__(self, space: gym.Space, nvec: NDArray, outputs: int = 2) -> None:
        super().__init__()
        width, size = token_width(space), flat_size(space)
        self.token_encoder: nn.Module = nn.Identity()
        if width is not None:
            self.token_encoder = encoder = TokenEncoder(width, stage_size=size)
            size = encoder.size
        self._first = torch.from_numpy(first_columns(nvec))  # column of each component's first choice
        self._columns = int(nvec.sum())
        layers, last = hidden_layers(size + self._columns, HIDDEN), nn.Linear(HIDDEN, outputs)
        self.network = nn.Sequential(*layers, last)
        nn.init.constant_(last.bias, INITIAL_LOG_ODDS)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.rows = torch.zeros(0, dtype=torch.int64)  # of the scored instances
        self.decisions = torch.zeros(0, len(nvec), dtype=torch.int32)  # scored decisions; on a table, indices of masks
        self.lost = torch.zeros(0)  # quality lost, negative: gained

    def remember(self, rows: NDArray, decisions: Tensor, lost: Tensor, observed: Tensor | None = None) -> None:
        """Add scored decisions: rows ``[n]``, decisions ``[n, components]``, the quality lost ``[n]``, from -1 to 1.

        ``observed`` is not used: observations before the first layer can be computed again.
        """
        self.rows = torch.cat([self.rows, torch.from_numpy(rows)])
        self.decisions = torch.cat([self.decisions, decisions.to(torch.int32)])
        self.lost = torch.cat([self.lost, lost])

    def fit(self, observations: Tensor | dict[str, Tensor], drawn: Tensor) -> float:
        """One step of AdamW on the cross-entropy of the remembered decisions ``drawn [n]``, which it returns."""
        lost = self.lost[drawn]
        targets = torch.stack([lost, -lost], dim=1).clamp(0, 1)
        return self.step(F.binary_cross_entropy_with_logits(self(observations, self.decisions[drawn]), targets))

    def step(self, error: Tensor) -> float:
        """One step of AdamW on an error, which it returns."""
        self.optimizer.zero_grad()
        error.backward()
        self.optimizer.step()
        return error.item()

    def forward(self, observations: Tensor | dict[str, Tensor], decisions: Tensor) -> Tensor:
        """Log-odds of a loss and of a gain, ``[tries * n, 2]``, from observations of ``n`` instances.

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
        """The expected quality loss ``[tries * n]``; see ``forward``."""
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
        """Continue from a ``state``."""
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rows, self.decisions, self.lost = state["memory"]
