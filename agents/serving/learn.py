"""Dials that PPO and A2C of Stable-Baselines3 learn: one network for all prices of the quality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from sd_gym.config import StrictModel
from sd_gym.envs.serving.dial import Network
from sd_gym.envs.serving.queues import BOUND, FEATURES, expected_loss
from sd_gym.envs.serving.shells import ServingVectorEnv

Array = NDArray
PRICES = 1.0, 100.0  # answers that a lost quality of 1 costs
VERSIONS = 24  # of a network, one a price
SEEDS_OF_A_RUN = 1000


class DialSettings(StrictModel):
    """Settings of PPO and A2C on serving envs; a rollout is ``num_envs * n_steps`` groups."""

    num_envs: int = Field(256, ge=1)
    n_steps: int = Field(32, ge=2)
    learning_rate: float = Field(3e-3, gt=0)
    gamma: float = Field(0.95, gt=0, le=1)
    gae_lambda: float = Field(0.9, ge=0, le=1)
    entropy: float = Field(0.001, ge=0)
    hidden: int = Field(64, ge=1, le=1024)


class PricedQueues(VecEnv):
    """A serving env for Stable-Baselines3, in which each episode has a price of the quality, drawn anew, to be seen.

    One network so learns the best dial at every price (a multiplier of the Lagrangian), and selection picks the price:
    nobody has to know it, and none has to be learned. The cost of an answer is its expectation, the loss of its point
    on policy rows: requests are drawn independently of all that a dial does, so only noise is taken out.
    """

    def __init__(self, env: ServingVectorEnv, seed: int) -> None:
        self.render_mode = None  # the library asks for it
        space = gym.spaces.Box(-BOUND, BOUND, (len(FEATURES) + 1,), np.float32)
        super().__init__(env.num_envs, space, env.single_action_space)
        self.env, self._loss = env, expected_loss(env.config)
        self._random, self._first = np.random.default_rng(seed), seed * SEEDS_OF_A_RUN
        self._prices = self._drawn()
        self._actions = np.zeros(0)

    def reset(self) -> Array:
        """Observations of new episodes."""
        return self._priced(self.env.reset(seed=self._first)[0])

    def step_async(self, actions: Array) -> None:
        """Take the actions for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Observations, rewards, dones and infos of the step."""
        observations, _, ended, _, infos = self.env.step(self._actions)
        told = infos.get("final_info", {})
        answers, refused = (np.where(ended, told.get(key, 0), infos[key]) for key in ("answers", "refused"))
        config, prices = self.env.config, np.exp(self._prices)
        rewards = -refused - prices * self._loss[self._actions] * answers
        # The critic's errors have to be small, as its gradient is clipped together with the actor's.
        rewards /= 10 * config.max_batch * (1 + prices * config.epsilon)
        listed: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for env in np.flatnonzero(ended):
            listed[env]["terminal_observation"] = self._priced(infos["final_obs"][env][None], env)[0]
        self._prices = np.where(ended, self._drawn(), self._prices)
        return self._priced(observations), rewards.astype(np.float32), ended, listed

    def _drawn(self) -> Array:
        return self._random.uniform(*np.log(PRICES), size=self.num_envs)

    def _priced(self, observations: Array, env: Any = slice(None)) -> Array:
        return np.column_stack([observations, shown(self._prices[env])]).astype(np.float32)

    def close(self) -> None:
        """Nothing is held."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the env, for each index."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the env."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the env once."""
        return [getattr(self.env, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Nothing is wrapped."""
        return [False for _ in self._get_indices(indices)]


def shown(log_price: Any) -> Any:
    """A price, given as its logarithm, as it is observed: from -1 to 1."""
    low, high = np.log(PRICES)
    return 2 * (log_price - low) / (high - low) - 1


class _Progress(BaseCallback):
    def __init__(self, on_progress: Callable[[int, dict[str, float]], None]) -> None:
        super().__init__()
        self._on_progress = on_progress

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        mean = float(self.model.rollout_buffer.rewards.mean())  # pyright: ignore[reportAttributeAccessIssue]
        self.logger.record("rollout/reward", mean)
        self.logger.dump(self.num_timesteps)
        self._on_progress(self.num_timesteps, {"reward": mean})


def learned(
    algo: str,
    env: ServingVectorEnv,
    settings: DialSettings,
    steps: int,
    seed: int,
    logger: Logger,
    on_progress: Callable[[int, dict[str, float]], None],
) -> list[Network]:
    """Learn for so many groups; returns the network's versions by price."""
    common: dict[str, Any] = {
        "learning_rate": LinearSchedule(settings.learning_rate, 0.0, 1.0),
        "n_steps": settings.n_steps,
        "gamma": settings.gamma,
        "gae_lambda": settings.gae_lambda,
        "ent_coef": settings.entropy,
        "policy_kwargs": {"net_arch": [settings.hidden, settings.hidden]},
        "seed": seed,
        "device": "cpu",
    }
    queues = PricedQueues(env, seed)
    algorithm: OnPolicyAlgorithm
    if algo == "ppo":
        minibatch = max(2, settings.num_envs * settings.n_steps // 4)
        algorithm = PPO("MlpPolicy", queues, batch_size=minibatch, n_epochs=8, **common)
    else:
        algorithm = A2C("MlpPolicy", queues, normalize_advantage=True, use_rms_prop=False, **common)
    algorithm.set_logger(logger)
    algorithm.learn(steps, callback=_Progress(on_progress), log_interval=None)  # pyright: ignore[reportArgumentType]
    return [priced(algorithm, log_price) for log_price in np.linspace(*np.log(PRICES), VERSIONS)]


def priced(algorithm: OnPolicyAlgorithm, log_price: float) -> Network:
    """The actor at a price, which becomes a part of the first bias."""
    first, _, second, _ = algorithm.policy.mlp_extractor.policy_net
    layers = [
        (layer.weight.detach().numpy().T.astype(np.float64), layer.bias.detach().numpy().astype(np.float64))
        for layer in (first, second, algorithm.policy.action_net)
    ]
    weight, bias = layers[0]
    return Network([(weight[:-1], bias + shown(log_price) * weight[-1]), *layers[1:]])
