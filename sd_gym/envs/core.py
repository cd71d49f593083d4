"""The batched core of all envs: instances, observations, and the scores of decisions. Its shells hold no logic."""

from __future__ import annotations

import copyreg
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sd_gym.backbones import load_backbone
from sd_gym.envs.config import EnvConfig
from sd_gym.envs.split import Split
from sd_gym.objectives import quality_cost
from sd_gym.tasks.ranking import STATISTICS_SIZE

Array = NDArray
OBSERVATION_LIMIT = 10.0


@dataclass(frozen=True)
class Outcome:
    """What came of some decisions; every field has one row an instance.

    Attributes:
        quality: Task quality under the decision, float64 ``[n]``.
        quality_ref: Task quality of the dense backbone, float64 ``[n]``.
        cost: ``max(0, quality_ref - epsilon - quality)``, float64 ``[n]``.
        flops_ratio: FLOPs under the decision over dense FLOPs, float64 ``[n]``.
    """

    quality: Array
    quality_ref: Array
    cost: Array
    flops_ratio: Array


class Core:
    """Draws instances, observes them, and scores decisions on them; shared by all envs of the same configuration.

    Args:
        config: The env's configuration.

    Raises:
        FileNotFoundError: If the data set or the backbone does not exist.
        sd_gym.tasks.data.DataError: If the data set is malformed.
        sd_gym.switch.UnsupportedArchitectureError: If the backbone cannot be switched.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config = config
        self.backbone = load_backbone(config.backbone, config.device)
        self._splits: dict[str, Split] = {}
        features = self.split("train").features[:STATISTICS_SIZE]
        self.observation_mean = features.mean(axis=0)
        # A feature that never changes in training says nothing: dividing by 1 leaves it at 0.
        deviation = features.std(axis=0)
        self.observation_deviation = np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of an env, in this process or another, shares the core of its configuration."""
        return shared_core, (self.config,)

    @property
    def n_switches(self) -> int:
        """Number of switches of the backbone."""
        return len(self.backbone.board)

    @property
    def nvec(self) -> Array:
        """Sizes of the action's components: 2 a switch, then the number of token levels; int64 ``[switches + 1]``."""
        return np.array([2] * self.n_switches + [len(self.config.token_shares)], dtype=np.int64)

    def split(self, name: str) -> Split:
        """A split by name, loaded when first asked for."""
        if name not in self._splits:
            self._splits[name] = Split(self.config, name)
        return self._splits[name]

    def observe(self, split: Split, rows: Array) -> Array:
        """Standardised observations, float32 ``[n, features]``, each within ``OBSERVATION_LIMIT``."""
        return self.standardised(split.features[rows])

    def standardised(self, features: Array) -> Array:
        """Raw observations ``[n, features]`` as a policy reads them: of the training split's mean and deviation."""
        standard = (features - self.observation_mean) / self.observation_deviation
        return np.clip(standard, -OBSERVATION_LIMIT, OBSERVATION_LIMIT)

    def check_decisions(self, decisions: Array, n: int) -> Array:
        """Decisions, whole numbers of any type, as an int64 array ``[n, switches + 1]``.

        Raises:
            ValueError: If the shape, type or a value is wrong.
        """
        array = as_array(decisions)
        if array.shape != (n, len(self.nvec)):
            raise ValueError(
                f"expected actions of shape {(n, len(self.nvec))} ({self.n_switches} switches and the token level for "
                f"each of {n} instances), got {array.shape}"
            )
        if array.dtype.kind not in "biuf":
            raise ValueError(f"actions must be integers (1 = skip), got {array.dtype}")
        broken = array != np.floor(array)
        if broken.any():
            raise ValueError(f"actions must be integers (1 = skip), got {array[broken][0]}")
        wrong = (array < 0) | (array >= self.nvec)
        if wrong.any():
            component = int(np.nonzero(wrong.any(axis=0))[0][0])
            raise ValueError(
                f"action component {component} must be in 0..{self.nvec[component] - 1}, got "
                f"{array[wrong[:, component], component][0]}"
            )
        return array.astype(np.int64)

    def score(self, split: Split, rows: Array, decisions: Array) -> Outcome:
        """What comes of one decision an instance; one batched run of the backbone.

        Args:
            split: Where the instances are.
            rows: Their rows, int64 ``[n]``.
            decisions: ``[n, switches + 1]``.

        Raises:
            ValueError: If the decisions are malformed.
        """
        decisions = self.check_decisions(decisions, len(rows))
        quality, quality_ref = split.quality(rows, decisions)
        flops_ratio = split.flops_ratio(rows, decisions)
        cost = quality_cost(quality, quality_ref, self.config.epsilon)
        return Outcome(quality, quality_ref, cost, flops_ratio)


def as_array(actions: Any) -> Array:
    """Actions as a NumPy array: of a tensor on any device too, whether or not it has a gradient."""
    return actions.detach().cpu().numpy() if isinstance(actions, torch.Tensor) else np.asarray(actions)


@lru_cache(maxsize=8)
def shared_core(config: EnvConfig) -> Core:
    """The core of a configuration: made once a process, since nothing in it but its caches ever changes."""
    return Core(config)


def _shared_split(config: EnvConfig, name: str) -> Split:
    return shared_core(config).split(name)


# A split is never copied, as its core is not.
copyreg.pickle(Split, lambda split: (_shared_split, (split.config, split.name)))
