"""Learning a dial by Stable-Baselines3's PPO and A2C: one network for all prices of quality."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray as Array
from pydantic import Field
from sd_gym.agents.learning.sb3 import warn_if_one_rollout
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule

from sd_gym.config import StrictModel
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.envs.serving.dial import Network
from sd_gym.envs.serving.queues import BOUND, FEATURES, expected_loss
from sd_gym.envs.serving.shells import ServingVectorEnv

PRICES = 0.05, 2.0  # cost of a lost quality of epsilon, in answers
VERSIONS = 24  # of a network, one per price
FIRST_SEED = 10_000_000  # of the arrivals to learn on; those for selection and test are below
SEEDS_OF_A_RUN = 1000
OnProgress = Callable[[int, dict[str, float]], None]  # called with (steps so far, figures to show)


class DialSettings(StrictModel):
    """Settings of PPO and A2C on serving envs.

    A rollout is ``num_envs * n_steps`` groups. ``n_steps=None`` is 32 for PPO, and 8 for A2C, which updates once per
    rollout. ``entropy=None`` is 0.001 for PPO, and 0.1 for A2C, which would soon choose one point for all queues.
    """

    num_envs: int = Field(256, ge=1)
    n_steps: int | None = Field(None, ge=2)
    learning_rate: float = Field(3e-3, gt=0)
    gamma: float = Field(0.95, gt=0, le=1)
    gae_lambda: float = Field(0.9, ge=0, le=1)
    entropy: float | None = Field(None, ge=0)
    hidden: int = Field(64, ge=1, le=1024)


class PricedQueues(SwitchableVecEnv):
    """A serving env for Stable-Baselines3 in which each episode draws a price of quality, which is observed.

    So one network learns the best dial at every price (a multiplier of the Lagrangian), and selection picks the price.
    The cost of an answer is its expectation, the loss of its point on policy rows. Requests do not depend on the dial,
    so this only removes noise.
    """

    def __init__(self, env: ServingVectorEnv, seed: int) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-BOUND, BOUND, (len(FEATURES) + 1,), np.float32)
        self._config = env.config
        self._loss = expected_loss(env.config)
        self._random = np.random.default_rng(seed)
        self._first = FIRST_SEED + seed * SEEDS_OF_A_RUN
        self._prices = self._draw_prices()

    def reset(self) -> Array:
        """Observations of new episodes."""
        return self._with_price(self.env.reset(seed=self._first)[0])

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Observations, rewards, dones and infos of the step."""
        observations, _, ended, _, infos = self.env.step(self._actions)
        final = infos.get("final_info", {})
        answers, refused = (np.where(ended, final.get(key, 0), infos[key]) for key in ("answers", "refused"))
        config, prices = self._config, np.exp(self._prices)
        rewards = -refused - prices * self._loss[self._actions] / config.epsilon * answers
        # The critic's errors must be small, because its gradient is clipped together with the actor's.
        rewards /= 10 * config.max_batch * (1 + prices)
        listed: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for env in np.flatnonzero(ended):
            listed[env]["terminal_observation"] = self._with_price(infos["final_obs"][env][None], env)[0]
        self._prices = np.where(ended, self._draw_prices(), self._prices)
        return self._with_price(observations), rewards.astype(np.float32), ended, listed

    def _draw_prices(self) -> Array:
        return self._random.uniform(*np.log(PRICES), size=self.num_envs)

    def _with_price(self, observations: Array, env: Any = slice(None)) -> Array:
        return np.column_stack([observations, observed_price(self._prices[env])]).astype(np.float32)


def observed_price(log_price: Any) -> Any:
    """A price as an observation from -1 to 1, from its logarithm."""
    low, high = np.log(PRICES)
    return 2 * (log_price - low) / (high - low) - 1


class _Progress(BaseCallback):
    def __init__(self, on_progress: OnProgress) -> None:
        super().__init__()
        self._on_progress = on_progress

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        mean = float(self.model.rollout_buffer.rewards.mean())  # pyright: ignore[reportAttributeAccessIssue]
        self.logger.record("rollout/reward", mean)
        self.logger.dump(self.num_timesteps)
        self._on_progress(self.num_timesteps, {"reward": mean})


def learn_dials(
    algo: str,
    env: ServingVectorEnv,
    settings: DialSettings,
    steps: int,
    seed: int,
    logger: Logger,
    on_progress: OnProgress,
) -> list[Network]:
    """Learn for ``steps`` groups; returns a version of the network per price."""
    n_steps, entropy = settings.n_steps or (32 if algo == "ppo" else 8), settings.entropy
    if entropy is None:
        entropy = 0.001 if algo == "ppo" else 0.1
    common: dict[str, Any] = {
        "learning_rate": LinearSchedule(settings.learning_rate, 0.0, 1.0),
        "n_steps": n_steps,
        "gamma": settings.gamma,
        "gae_lambda": settings.gae_lambda,
        "ent_coef": entropy,
        "policy_kwargs": {"net_arch": [settings.hidden, settings.hidden]},
        "seed": seed,
        "device": "cpu",
    }
    queues = PricedQueues(env, seed)
    warn_if_one_rollout(steps, settings.num_envs * n_steps)
    algorithm: OnPolicyAlgorithm
    if algo == "ppo":
        minibatch = max(2, settings.num_envs * n_steps // 4)
        algorithm = PPO("MlpPolicy", queues, batch_size=minibatch, n_epochs=8, **common)
    else:
        algorithm = A2C("MlpPolicy", queues, normalize_advantage=True, use_rms_prop=False, **common)
    algorithm.set_logger(logger)
    algorithm.learn(steps, callback=_Progress(on_progress), log_interval=None)  # pyright: ignore[reportArgumentType]
    return [actor_at_price(algorithm, log_price) for log_price in np.log(np.geomspace(*PRICES, VERSIONS))]


def actor_at_price(algorithm: OnPolicyAlgorithm, log_price: float) -> Network:
    """The actor at a fixed price, which is added to the first bias."""
    hidden: Any = algorithm.policy.mlp_extractor.policy_net  # with tanh in between
    head: Any = algorithm.policy.action_net
    layers = [
        (layer.weight.detach().numpy().T.astype(np.float64), layer.bias.detach().numpy().astype(np.float64))
        for layer in (hidden[0], hidden[2], head)
    ]
    weight, bias = layers[0]
    return Network([(weight[:-1], bias + observed_price(log_price) * weight[-1]), *layers[1:]])
