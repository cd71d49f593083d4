"""What the agents of Stable-Baselines3 share: the env shell, logging, and the export of their policy."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.common.agent import INFO_TAGS, Agent, OnRollout, Rollout, initial_bias
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor

from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.policy import HIDDEN, DecisionPolicy

LOGGED_DECISIONS = 1024  # about so many between two points of a curve, whatever the size of a rollout


class Blindfold(VecEnvWrapper):
    """A ``VecEnv`` whose observations are zeros."""

    def reset(self) -> NDArray:
        """Zeros."""
        return np.zeros_like(self.venv.reset())

    def step_wait(self) -> tuple[NDArray, NDArray, NDArray, list[dict[str, Any]]]:
        """The step with zeros for observations."""
        observations, rewards, dones, infos = self.venv.step_wait()
        return np.zeros_like(observations), rewards, dones, infos


class _RolloutCallback(BaseCallback):
    """Gathers the infos of a rollout, records the project's tags and passes the rollout on."""

    def __init__(self, on_rollout: OnRollout) -> None:
        super().__init__()
        self._on_rollout = on_rollout
        self._infos: list[dict[str, Any]] = []
        self._rewards: list[NDArray] = []

    def _on_step(self) -> bool:
        self._infos += self.locals["infos"]
        self._rewards.append(self.locals["rewards"])
        return True

    def _on_rollout_end(self) -> None:
        keys = (*INFO_TAGS, "is_success")
        infos = {key: np.array([info[key] for info in self._infos]) for key in keys}
        rollout = Rollout(self.num_timesteps, np.concatenate(self._rewards), infos)
        rollout.record(self.logger)
        self._infos, self._rewards = [], []
        self._on_rollout(rollout)


class SB3Agent(Agent):
    """An on-policy algorithm of Stable-Baselines3; subclasses choose which."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vec_env: VecEnv = VecMonitor(SwitchableVecEnv(self.env))
        if self.blind:
            vec_env = Blindfold(vec_env)
        self.algorithm = self._make_algorithm(vec_env)
        with torch.no_grad():
            bias = self.algorithm.policy.action_net.bias
            bias.copy_(initial_bias(self.env.core.nvec, self.settings.initial_skip_rate))

    @abstractmethod
    def _make_algorithm(self, vec_env: VecEnv) -> OnPolicyAlgorithm:
        """The algorithm, untrained, on ``vec_env``."""

    def _common(self, vec_env: VecEnv) -> dict[str, Any]:
        """Arguments that the algorithms share. An episode is one decision, so discounting plays no part."""
        return {
            "policy": "MlpPolicy",
            "env": vec_env,
            "learning_rate": self.settings.learning_rate,
            "n_steps": self.settings.n_steps,
            "gamma": 1.0,
            "gae_lambda": 1.0,
            "ent_coef": self.settings.entropy,
            "policy_kwargs": {"net_arch": {"pi": [HIDDEN, HIDDEN], "vf": [HIDDEN, HIDDEN]}},
            "seed": self.seed,
            "device": "cpu",
        }

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn from at least ``total_steps`` decisions."""
        self.algorithm.set_logger(logger)
        interval = max(1, LOGGED_DECISIONS // (self.algorithm.n_envs * self.algorithm.n_steps))
        self.algorithm.learn(total_steps, callback=_RolloutCallback(on_rollout), log_interval=interval)

    def policy(self) -> DecisionPolicy:
        """The actor's weights in the project's own network, which decides the same."""
        exported = self._new_policy()
        actor = self.algorithm.policy
        source = [*actor.mlp_extractor.policy_net, actor.action_net]
        target = [*exported.body, exported.head]
        for ours, theirs in zip(target, source, strict=True):
            ours.load_state_dict(theirs.state_dict())
        return exported.eval()

    def save_extra(self, folder: Path) -> None:
        """Write ``sb3.zip``, from which Stable-Baselines3 can go on."""
        self.algorithm.save(folder / "sb3.zip")
