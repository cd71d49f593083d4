"""The decision network as an artefact: made, saved, loaded. Agents train it, inference runs it."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HIDDEN = 64
FORMAT = 1


class DecisionPolicy(nn.Module):
    """From observations to decisions: two hidden layers, then one categorical choice an action component.

    The choices are independent given the observation: ``pi(a|x) = prod_i pi_i(a_i|x)`` (Zhang et al. 2024, section 3).

    Args:
        observation_size: Features of an observation.
        nvec: Sizes of the action's components.
        switches: Names of the switches, in the action's order; only stored, so that a policy tells what it decides on.
        blind: Whether the observation is zeroed: the control that sees nothing of its input.
        stochastic: Whether decisions are drawn (from a fixed seed) instead of the most probable ones taken.
        hidden: Width of the hidden layers.
    """

    def __init__(
        self,
        observation_size: int,
        nvec: list[int],
        switches: list[str],
        *,
        blind: bool = False,
        stochastic: bool = False,
        hidden: int = HIDDEN,
    ) -> None:
        super().__init__()
        self.observation_size = observation_size
        self.nvec = [int(size) for size in nvec]
        self.switches = list(switches)
        self.blind = blind
        self.stochastic = stochastic
        self.hidden = hidden
        self.body = nn.Sequential(nn.Linear(observation_size, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.head = nn.Linear(hidden, sum(self.nvec))

    def forward(self, observations: Tensor) -> list[Tensor]:
        """Logits of each action component, each ``[n, size]``, for observations ``[n, features]``."""
        if self.blind:
            observations = torch.zeros_like(observations)
        return list(self.head(self.body(observations)).split(self.nvec, dim=1))

    @torch.inference_mode()
    def decide(self, observations: NDArray) -> NDArray:
        """Decisions, int64 ``[n, switches + 1]``, for observations ``[n, features]``: the most probable ones."""
        device = self.head.weight.device
        logits = self(torch.as_tensor(observations, dtype=torch.float32, device=device))
        if self.stochastic:
            generator = torch.Generator(device).manual_seed(0)
            logits = [_gumbel(choice, generator) for choice in logits]
        return torch.stack([choice.argmax(dim=1) for choice in logits], dim=1).cpu().numpy()

    def more_cautious(self, margin: float) -> DecisionPolicy:
        """A copy that skips only where it prefers skipping by more than ``margin`` in log-odds."""
        cautious = deepcopy(self)
        running = np.cumsum([0, *self.nvec[:-1]])  # the first choice of each component leaves everything running
        with torch.no_grad():
            cautious.head.bias[torch.from_numpy(running)] += margin
        return cautious

    @property
    def flops(self) -> int:
        """FLOPs of one decision, 2 per multiply-add."""
        return 2 * sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))

    def save(self, folder: Path) -> None:
        """Write ``policy.safetensors`` and ``policy.json``; each file appears complete or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format": FORMAT,
            "observation_size": self.observation_size,
            "nvec": self.nvec,
            "switches": self.switches,
            "blind": self.blind,
            "stochastic": self.stochastic,
            "hidden": self.hidden,
        }
        weights = {key: value.contiguous() for key, value in self.state_dict().items()}
        save_file(weights, folder / "policy.safetensors.tmp")
        os.replace(folder / "policy.safetensors.tmp", folder / "policy.safetensors")
        write_json(folder / "policy.json", description)

    @classmethod
    def load(cls, folder: Path) -> DecisionPolicy:
        """Read a policy that ``save`` wrote.

        Raises:
            FileNotFoundError: If the folder holds none.
            ValueError: If its format is another one.
        """
        file = Path(folder) / "policy.json"
        if not file.exists():
            raise FileNotFoundError(f"no policy.json in {folder}; expected the folder of a run (sd-gym train)")
        description = json.loads(file.read_text(encoding="utf-8"))
        if description.pop("format", None) != FORMAT:
            raise ValueError(f"{file}: not a policy of format {FORMAT}")
        policy = cls(**description)
        policy.load_state_dict(load_file(Path(folder) / "policy.safetensors"))
        return policy.eval()


def _gumbel(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Logits plus Gumbel noise: their argmax is a draw from the softmax."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    return logits - torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))


def write_json(file: Path, value: Any) -> None:
    """Write JSON to a temporary name, then rename: a reader never sees half a file."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, default=_plain) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
