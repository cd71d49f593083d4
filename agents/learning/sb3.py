"""Base class of the agents of Stable-Baselines3: env, logging, state, and the export of their policy."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.learning.agent import INFO_KEYS, Agent, LearnerSettings, OnRollout, Rollout, learning_bias
from sd_gym.agents.learning.curves import CurveLogger
from sd_gym.agents.learning.vec_envs import ObservationVecEnv, noise_deviation
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.files import write_tensors
from sd_gym.policy import HIDDEN, DecisionPolicy, PerStageMLP, blinded, registered_network
from sd_gym.policy.token_encoder import TokenEncoder

# Weight of the critic's loss. Actor and critic share no layer, but the library clips their gradients together. At its
# default weight, 0.5, the critic's error on a lost instance (a reward of -20) would leave almost no step for the actor.
VALUE_WEIGHT = 0.02
IMPOSSIBLE_LOGIT = -1e9  # logit of a choice that a stage does not have


class StageConditioned(nn.Module):
    """A body whose output begins with the stage, one-hot, like its input: ``[n, stages + width]``."""

    def __init__(self, body: nn.Module, stages: int) -> None:
        super().__init__()
        self.body = body
        self.stages = stages

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """``[n, features]`` to ``[n, stages + width]``."""
        return torch.cat([observations[:, : self.stages], self.body(observations)], dim=1)


class StageHead(nn.Module):
    """Selects the logits of an action at each row's stage from those of all switches.

    Components that a stage does not decide have certain choices, which add nothing to log-probabilities and entropy.
    ``places`` are the indices of an action's choices in the logits of ``head``, int64 ``[stages, choices]``
    (``StageActions.logit_indices``).
    """

    places: torch.Tensor

    def __init__(self, head: nn.Module, places: NDArray) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("places", torch.from_numpy(places), persistent=False)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, choices]`` of the features ``[n, stages + width]`` that ``StageConditioned`` returns."""
        stages = len(self.places)
        logits = self.head(latent[:, stages:])
        certain = logits.new_tensor([0.0, IMPOSSIBLE_LOGIT]).expand(len(logits), 2)
        return torch.cat([logits, certain], dim=1).gather(1, self.places[latent[:, :stages].argmax(dim=1)])


class TokenExtractor(BaseFeaturesExtractor):
    """A token encoder as the library's features extractor; actor and critic each have their own."""

    def __init__(self, observation_space: gym.spaces.Dict, channels: int) -> None:
        width = token_width(observation_space)
        assert width is not None  # it is used only where tokens are observed
        encoder = TokenEncoder(width, channels, stage_size=flat_size(observation_space))
        super().__init__(observation_space, features_dim=encoder.size)
        self.token_encoder = encoder

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features ``[n, size]``; see ``TokenEncoder``."""
        return self.token_encoder(observations)


class DecisionActorCritic(ActorCriticPolicy):
    """The library's policy, but the actor has logits of a whole decision.

    ``network`` names a registered network for the actor; ``None``: the library's hidden layers, for each stage if
    ``per_stage``. ``places`` is that of ``StageHead`` if an env has several stages.
    """

    def __init__(
        self, *args: Any, network: str | None, places: NDArray | None, n_logits: int, per_stage: bool, **kwargs: Any
    ) -> None:
        self.actor_settings = {"network": network, "places": places, "n_logits": n_logits, "per_stage": per_stage}
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        network, places, n_logits, per_stage = self.actor_settings.values()
        if network is not None:
            body, head = registered_network(network, self.features_dim, n_logits)
        else:
            body = self.mlp_extractor.policy_net
            if per_stage:
                body = PerStageMLP(self.features_dim, self.mlp_extractor.latent_dim_pi, len(places))
                body.apply(partial(self.init_weights, gain=2**0.5))  # the library's gain
            head = nn.Linear(self.mlp_extractor.latent_dim_pi, n_logits)
            self.init_weights(head, gain=0.01)  # the library's gain
        if places is not None:
            body, head = StageConditioned(body, len(places)), StageHead(head, places)
        self.mlp_extractor.policy_net = body  # pyright: ignore[reportAttributeAccessIssue]  # it only calls it
        self.action_net, rate = head, lr_schedule(1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=rate, **self.optimizer_kwargs)  # pyright: ignore[reportCallIssue]  # all torch optimizers take it

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self.actor_settings}


class _RolloutCallback(BaseCallback):
    """Gathers the infos of a rollout; after the update records the tags of the rollout and passes it on."""

    def __init__(self, agent: SB3Agent, on_rollout: OnRollout) -> None:
        super().__init__()
        self._agent = agent
        self._on_rollout = on_rollout
        self._infos: list[list[dict[str, Any]]] = []
        self._finished: Rollout | None = None

    def _on_rollout_start(self) -> None:
        if self._finished is not None:
            self._finished.record(self.logger)
            self._agent.algorithm.dump_logs()
            self._on_rollout(self._finished)
            self._finished = None

    _on_training_end = _on_rollout_start

    def _on_step(self) -> bool:
        self._infos.append(self.locals["infos"])
        return True

    def _on_rollout_end(self) -> None:
        stages = self._agent.stages
        ended = self._infos[stages - 1 :: stages]
        infos = {key: np.array([[info[key] for info in step] for step in ended]) for key in INFO_KEYS}
        self._agent.before_update(infos)
        flat = {key: values.ravel() for key, values in infos.items()}
        rewards = self._agent.algorithm.rollout_buffer.rewards.reshape(len(ended), stages, -1).sum(axis=1).ravel()
        self._finished = Rollout(self.num_timesteps // stages, rewards, flat, stages)
        self._infos = []


class SB3Settings(LearnerSettings):
    """Settings of the library's algorithms; a rollout is ``num_envs * n_steps`` decisions.

    Attributes:
        n_steps: Decisions of each env in a rollout.
        noise: Gaussian noise on flat observations while learning, in deviations of each feature; ``None``: 1.0 with
            fifty decisions per row or more, else 0.
    """

    n_steps: int = Field(1, ge=1)
    noise: float | None = Field(None, ge=0)


SB3SettingsT = TypeVar("SB3SettingsT", bound=SB3Settings)


class SB3Agent(Agent[SB3SettingsT]):
    """An on-policy algorithm of Stable-Baselines3, chosen by subclasses. Each of several stages is a step."""

    staged = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stages = len(self.env.core.stages)
        if self.settings.num_envs * self.settings.n_steps * self.stages < 2:
            raise ValueError("num_envs * n_steps: expected at least 2 decisions per rollout, which are compared; got 1")
        vec_env = SwitchableVecEnv(self._reward_env())
        self._vec_env = ObservationVecEnv(vec_env, self.env.core.stages, blind=self.blind)
        self.algorithm = self._make_algorithm()
        self._standardise_encoders(self.algorithm.policy)
        with torch.no_grad():
            if self.start is not None:
                for theirs, ours in zip(self._actor(), _modules(self.start), strict=True):
                    theirs.load_state_dict(ours.state_dict())
            else:
                bias = learning_bias(self.env.core, self.settings.initial_skip_rate)
                self._actor()[-1].get_parameter("bias").copy_(bias)

    def _reward_env(self) -> VectorEnv:
        """The env with the rewards to learn from: the agent's own, or a wrapper around it."""
        return self.env

    @abstractmethod
    def _make_algorithm(self) -> OnPolicyAlgorithm:
        """The algorithm, untrained."""

    def _common(self) -> dict[str, Any]:
        """Arguments of all algorithms. An episode is one decision, so nothing is discounted."""
        settings, core = self.settings, self.env.core
        policy: str | type[ActorCriticPolicy] = "MlpPolicy" if self.channels is None else "MultiInputPolicy"
        own: dict[str, Any] = {}
        places, n_logits = core.stage_actions.logit_indices()
        if settings.network is not None or places is not None:
            policy = DecisionActorCritic
            own = {"network": settings.network, "places": places, "n_logits": n_logits, "per_stage": self.per_stage}
        if self.channels is not None:
            own |= {"features_extractor_class": TokenExtractor, "share_features_extractor": False}
            own["features_extractor_kwargs"] = {"channels": self.channels}
        return {
            "policy": policy,
            "env": self._vec_env,
            "learning_rate": LinearSchedule(settings.learning_rate, 0.0, 1.0),
            "n_steps": settings.n_steps * self.stages,
            "stats_window_size": self._vec_env.num_envs * settings.n_steps,  # the episodes of a rollout
            "gamma": 1.0,
            "gae_lambda": 1.0,
            "ent_coef": settings.entropy,
            "vf_coef": VALUE_WEIGHT,
            "policy_kwargs": {"net_arch": {"pi": [HIDDEN, HIDDEN], "vf": [HIDDEN, HIDDEN]}, **own},
            "seed": self.seed,
            "device": "cpu",
        }

    def _actor(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The counterparts of ``_modules``."""
        policy = self.algorithm.policy
        body: nn.Module = policy.mlp_extractor.policy_net
        head: nn.Module = policy.action_net
        if isinstance(body, StageConditioned) and isinstance(head, StageHead):
            body, head = body.body, head.head
        return getattr(policy.pi_features_extractor, "token_encoder", nn.Identity()), body, head

    def before_update(self, infos: dict[str, NDArray]) -> None:
        """Called with a rollout's infos, each ``[steps, envs]``, before the algorithm learns from it."""

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """See ``BaseAgent.learn``."""
        algorithm, core = self.algorithm, self.env.core
        warn_if_one_rollout(total_steps, self._vec_env.num_envs * self.settings.n_steps)
        self._vec_env.deviation = noise_deviation(core, self.env.config.split, self.settings.noise, total_steps)
        done = algorithm.num_timesteps // self.stages
        algorithm.set_logger(CurveLogger(logger, total_steps, done, self.stages))
        algorithm.learn(
            total_steps * self.stages - algorithm.num_timesteps,
            callback=_RolloutCallback(self, on_rollout),
            log_interval=None,  # pyright: ignore[reportArgumentType]  (never; the callback logs, after an update)
            reset_num_timesteps=algorithm.num_timesteps == 0,
        )

    def policy(self) -> DecisionPolicy:
        """The actor's weights in the project's own network, which makes the same decisions."""
        exported = self.new_policy()
        for ours, theirs in zip(_modules(exported), self._actor(), strict=True):
            ours.load_state_dict(theirs.state_dict())
        return exported.eval()

    def state(self) -> dict[str, Any]:
        """Weights, optimizers, counters, the library's random states, and the env's state."""
        algorithm = self.algorithm
        _, keys, *rest = np.random.get_state()  # noqa: NPY002  (the library shuffles with it)
        return {
            "parameters": algorithm.get_parameters(),
            "steps": algorithm.num_timesteps,
            "updates": algorithm._n_updates,
            "progress_left": algorithm._current_progress_remaining,  # as of the last update
            "torch": torch.get_rng_state(),
            "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
            "env": self.env.state(),
            "observed": None if self._vec_env.deviation is None else torch.from_numpy(algorithm._last_obs),  # pyright: ignore[reportArgumentType]  # only flat observations have noise
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state``."""
        algorithm = self.algorithm
        algorithm.set_parameters(state["parameters"])
        algorithm.num_timesteps = state["steps"]
        algorithm._n_updates = state["updates"]
        algorithm._current_progress_remaining = state["progress_left"]
        assert algorithm.env is not None
        algorithm.env.reset()  # the loaded states undo its random draws
        observations = self.env.load_state(state["env"])
        if state["observed"] is not None:  # with their noise
            observations = state["observed"].numpy()
        algorithm._last_obs = blinded(observations, self.env.core.stages) if self.blind else observations
        algorithm._last_episode_starts = np.ones(algorithm.n_envs, dtype=bool)
        keys, *rest = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(state["torch"])

    def save_extra(self, folder: Path) -> None:
        """Write ``sb3.safetensors``, the parameters of the library's own policy, including the critic's.

        ``model = PPO("MlpPolicy", vec_env)``; ``model.policy.load_state_dict(safetensors.torch.load_file(file))``.
        """
        write_tensors(folder / "sb3.safetensors", self.algorithm.policy.state_dict())


def _modules(policy: DecisionPolicy) -> tuple[nn.Module, nn.Module, nn.Module]:
    return policy.token_encoder, policy.body, policy.head


def warn_if_one_rollout(steps: int, rollout: int) -> None:
    """Warn if nothing is learned: the learning rate has fallen to 0 when the last rollout is learned from."""
    if steps <= rollout:
        message = f"{steps} steps are at most one rollout of {rollout}, so nothing is learned"
        warnings.warn(f"{message}; pass more steps, or smaller n_steps and num_envs", stacklevel=3)
