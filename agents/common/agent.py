"""The one interface of all agents."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from stable_baselines3.common.logger import Logger

from sd_gym.envs.shells import SwitchableVectorEnv
from sd_gym.policy import DecisionPolicy

INFO_TAGS = ("quality", "quality_ref", "flops_ratio")


class AgentSettings(BaseModel):
    """Settings of an agent; each agent has its own subclass, every field of it can be set by name.

    Attributes:
        num_envs: Of the vector env that ``train`` makes for the agent: instances decided on in one step, scored by one
            batched run of the backbone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_envs: int = Field(256, ge=1)


class LearnerSettings(AgentSettings):
    """What all agents that learn share.

    Attributes:
        learning_rate: Of Adam.
        entropy: Weight of the entropy bonus.
        initial_skip_rate: How often each switch is skipped before anything is learned.
    """

    learning_rate: float = Field(1e-3, gt=0)
    entropy: float = Field(0.0, ge=0)
    initial_skip_rate: float = Field(0.1, gt=0, lt=1)


@dataclass
class Rollout:
    """What came of the decisions of one rollout, one value a decision.

    Attributes:
        steps: Decisions made so far, this rollout included.
        rewards: ``[n]``.
        infos: ``quality``, ``quality_ref``, ``flops_ratio`` and ``is_success``, each ``[n]``.
    """

    steps: int
    rewards: NDArray
    infos: dict[str, NDArray]

    def record(self, logger: Logger) -> None:
        """Record the project's tags; those of Stable-Baselines3 are recorded by whoever owns the loop."""
        for tag in INFO_TAGS:
            logger.record(f"rollout/{tag}", float(np.mean(self.infos[tag])))


OnRollout = Callable[[Rollout], None]


class Agent(ABC):
    """Learns a policy on a vector env.

    Args:
        env: What it learns on.
        seed: Of its weights and exploration.
        blind: Whether it sees zeros instead of the observation.
        settings: Fields of ``Settings``.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    Settings: ClassVar[type[AgentSettings]] = AgentSettings

    def __init__(self, env: SwitchableVectorEnv, *, seed: int = 0, blind: bool = False, **settings: Any) -> None:
        for key in settings:
            if key not in self.Settings.model_fields:
                known = list(self.Settings.model_fields)
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown setting {key!r} of {type(self).__name__}{hint} Known: {', '.join(known)}.")
        self.env = env
        self.seed = seed
        self.blind = blind
        self.settings = self.Settings(**settings)

    @abstractmethod
    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn from at least ``total_steps`` decisions; ``on_rollout`` is called after each rollout."""

    @abstractmethod
    def policy(self) -> DecisionPolicy:
        """The current policy as an artefact of its own, independent of the agent."""

    def save_extra(self, folder: Path) -> None:  # noqa: B027  (most agents keep nothing)
        """Write what the agent keeps beside the policy, such as Stable-Baselines3's zip."""

    def _new_policy(self, **kwargs: Any) -> DecisionPolicy:
        core = self.env.core
        size = self.env.single_observation_space.shape[0]
        return DecisionPolicy(size, core.nvec.tolist(), core.backbone.board.names, blind=self.blind, **kwargs)


def initial_bias(nvec: NDArray, skip_rate: float) -> torch.Tensor:
    """Logits of all components such that each switch is skipped with ``skip_rate`` and no token is dropped.

    Learning starts near the dense backbone: from even odds nearly every decision breaks it, and all rewards are alike.

    Returns:
        float32 ``[sum(nvec)]``.
    """
    half = 0.5 * float(np.log((1 - skip_rate) / skip_rate))
    return torch.cat([torch.tensor([half] + [-half] * (int(size) - 1)) for size in nvec])
