"""What the agents of Stable-Baselines3 share: the env shell, logging, state, and the export of their policy."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from sd_gym.agents.learning.agent import INFO_KEYS, Agent, OnRollout, Rollout, learning_bias
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor
from torch import nn

from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.envs.spaces import Observations, flat_size, token_width
from sd_gym.files import write_tensors
from sd_gym.policy import HIDDEN, DecisionPolicy, PerStageMLP, blinded, registered_network
from sd_gym.policy.token_encoder import TokenEncoder

# Of the critic's loss. Actor and critic share no layer, but the library clips their gradients together: at its own 0.5,
# a lost instance (a reward of -20) is an error that leaves the actor hardly a step, just where it has most to learn.
VALUE_WEIGHT = 0.02
NEVER = -1e9  # logit of a choice that a stage has not
LOGGED_DECISIONS = 1024  # about so many between two points of a curve, whatever the size of a rollout


class Blindfold(VecEnvWrapper):
    """A ``VecEnv`` whose observations say nothing of the input.

    Args:
        env: The env.
        stages: Names of its stages.
    """

    def __init__(self, env: VecEnv, stages: list[str]) -> None:
        super().__init__(env)
        self.stages = stages

    def reset(self) -> Observations:
        """The first observations, blinded."""
        return blinded(self.venv.reset(), self.stages)

    def step_wait(self) -> tuple[Observations, NDArray, NDArray, list[dict[str, Any]]]:
        """The step with blinded observations."""
        observations, rewards, dones, infos = self.venv.step_wait()
        return blinded(observations, self.stages), rewards, dones, infos


class StageConditioned(nn.Module):
    """A body whose output tells the stage as well, which its input begins with.

    Args:
        body: From observations ``[n, features]``.
        stages: How many there are.
    """

    def __init__(self, body: nn.Module, stages: int) -> None:
        super().__init__()
        self.body, self.stages = body, stages

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """``[n, stages + width]``."""
        return torch.cat([observations[:, : self.stages], self.body(observations)], dim=1)


class AtStage(nn.Module):
    """Logits of an action at each row's stage, out of those of all switches.

    What a stage has not can only be left alone: it is drawn with certainty, and adds nothing to log-probabilities and
    entropy.

    Args:
        head: To the logits of all components of a decision.
        places: For each stage, where in them an action's choices are; behind them stand a choice that is certain, and
            one that is never made, int64 ``[stages, choices]``.
    """

    def __init__(self, head: nn.Module, places: NDArray) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("places", torch.from_numpy(places), persistent=False)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """``[n, stages + width]`` as of ``StageConditioned`` to ``[n, choices]``."""
        stages = len(self.places)
        logits = self.head(latent[:, stages:])
        certain = logits.new_tensor([0.0, NEVER]).expand(len(logits), 2)
        return torch.cat([logits, certain], dim=1).gather(1, self.places[latent[:, :stages].argmax(dim=1)])


class TokenExtractor(BaseFeaturesExtractor):
    """The library's place for a token encoder; actor and critic each have their own.

    Args:
        observation_space: That of tokens.
        channels: Of the token encoder.
    """

    def __init__(self, observation_space: gym.spaces.Dict, channels: int) -> None:
        encoder = TokenEncoder(token_width(observation_space), channels, stage_size=flat_size(observation_space))
        super().__init__(observation_space, features_dim=encoder.size)
        self.token_encoder = encoder

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """As of ``TokenEncoder``."""
        return self.token_encoder(observations)


class DecisionActorCritic(ActorCriticPolicy):
    """The library's policy with an actor that has the logits of a whole decision; the critic is the usual one.

    Args:
        network: Name of a registered network, as the actor; ``None``: the library's hidden layers.
        places: As ``AtStage`` takes them, where an env has several stages; else ``None``.
        n_logits: Of a whole decision.
        per_stage: Whether each stage has hidden layers of its own.
        args: As of the library's policy.
        kwargs: As of the library's policy.
    """

    def __init__(
        self, *args: Any, network: str | None, places: NDArray | None, n_logits: int, per_stage: bool, **kwargs: Any
    ) -> None:
        self.own = {"network": network, "places": places, "n_logits": n_logits, "per_stage": per_stage}
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        network, places, n_logits, per_stage = self.own.values()
        if network is not None:
            body, head = registered_network(network, self.features_dim, n_logits)
        else:
            body = self.mlp_extractor.policy_net
            if per_stage:
                body = PerStageMLP(self.features_dim, self.mlp_extractor.latent_dim_pi, len(places))
                body.apply(partial(self.init_weights, gain=2**0.5))  # as the library does
            head = nn.Linear(self.mlp_extractor.latent_dim_pi, n_logits)
            self.init_weights(head, gain=0.01)  # as the library does
        if places is not None:
            body, head = StageConditioned(body, len(places)), AtStage(head, places)
        self.mlp_extractor.policy_net, self.action_net = body, head
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self.own}


class _Decisions(Logger):
    """A logger whose points stand at the decisions that were made, where each takes several of the library's steps."""

    def __init__(self, logger: Logger, stages: int) -> None:
        vars(self).update(vars(logger))
        self._stages = stages

    def dump(self, step: int = 0) -> None:
        super().dump(step // self._stages)


class _RolloutCallback(BaseCallback):
    """Gathers the infos of a rollout, records the project's tags, passes the rollout on when it was learned from."""

    def __init__(self, agent: SB3Agent, on_rollout: OnRollout) -> None:
        super().__init__()
        self._agent = agent
        self._on_rollout = on_rollout
        self._infos: list[list[dict[str, Any]]] = []
        self._rewards: list[NDArray] = []
        self._finished: Rollout | None = None
        self.rollouts = 0

    def _on_rollout_start(self) -> None:
        self._pass_on()

    def _on_step(self) -> bool:
        self._infos.append(self.locals["infos"])
        self._rewards.append(self.locals["rewards"])
        return True

    def _on_rollout_end(self) -> None:
        stages = self._agent.stages
        ended = self._infos[stages - 1 :: stages]
        infos = {key: np.array([[info[key] for info in step] for step in ended]) for key in INFO_KEYS}
        self._agent.before_update(infos)
        flat = {key: values.ravel() for key, values in infos.items()}
        rewards = np.array(self._rewards).reshape(len(ended), stages, -1).sum(axis=1).ravel()
        self._finished = Rollout(self.num_timesteps // stages, rewards, flat, stages)
        self._finished.record(self.logger)
        self._infos, self._rewards = [], []
        self.rollouts += 1

    def _on_training_end(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        if self._finished is not None:
            self._on_rollout(self._finished)
            self._finished = None


class SB3Agent(Agent):
    """An on-policy algorithm of Stable-Baselines3; subclasses choose which.

    Where an env has several stages each is a step of the library, and a rollout has all steps of its decisions.

    Attributes:
        stages: Steps of a decision.
    """

    staged = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stages = len(self.env.core.stages)
        vec_env: VecEnv = VecMonitor(SwitchableVecEnv(self._rewarding()))
        if self.blind:
            vec_env = Blindfold(vec_env, self.env.core.stages)
        self.algorithm = self._make_algorithm(vec_env)
        self._begin(*self._networks())
        with torch.no_grad():
            if self.start is not None:
                start = self.start.token_encoder, self.start.body, self.start.head
                for theirs, ours in zip(self._actor(), start, strict=True):
                    theirs.load_state_dict(ours.state_dict())
            else:
                bias = learning_bias(self.env.core, self.settings.initial_skip_rate)
                self._actor()[-1].bias.copy_(bias)

    def _rewarding(self) -> VectorEnv:
        """The env whose rewards are learned from: the agent's own, or a wrapper around it."""
        return self.env

    @abstractmethod
    def _make_algorithm(self, vec_env: VecEnv) -> OnPolicyAlgorithm:
        """The algorithm, untrained, on ``vec_env``."""

    def _common(self, vec_env: VecEnv) -> dict[str, Any]:
        """Arguments that the algorithms share. An episode is one decision, so nothing is discounted."""
        network, core = self.settings.network, self.env.core
        own: dict[str, Any] = {}
        policy = "MlpPolicy" if self.channels is None else "MultiInputPolicy"
        if network is not None or core.is_staged:
            places, n_logits = core.steps.of_logits()
            places = places if core.is_staged else None
            own = {"network": network, "places": places, "n_logits": n_logits, "per_stage": self.per_stage}
        encoder: dict[str, Any] = {}
        if self.channels is not None:
            encoder = {
                "features_extractor_class": TokenExtractor,
                "features_extractor_kwargs": {"channels": self.channels},
            }
            encoder["share_features_extractor"] = False
        return {
            "policy": DecisionActorCritic if own else policy,
            "env": vec_env,
            "learning_rate": LinearSchedule(self.settings.learning_rate, 0.0, 1.0),
            "n_steps": self.settings.n_steps * self.stages,
            # The library averages over its last episodes: as many as a rollout has, as in all agents.
            "stats_window_size": vec_env.num_envs * self.settings.n_steps,
            "gamma": 1.0,
            "gae_lambda": 1.0,
            "ent_coef": self.settings.entropy,
            "vf_coef": VALUE_WEIGHT,
            "policy_kwargs": {"net_arch": {"pi": [HIDDEN, HIDDEN], "vf": [HIDDEN, HIDDEN]}, **own, **encoder},
            "seed": self.seed,
            "device": "cpu",
        }

    def _networks(self) -> list[nn.Module]:
        """All that learn."""
        return [self.algorithm.policy]

    def _actor(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """What corresponds to ``DecisionPolicy``'s token encoder, body and head."""
        policy = self.algorithm.policy
        body, head = policy.mlp_extractor.policy_net, policy.action_net
        body, head = (body.body, head.head) if self.env.core.is_staged else (body, head)
        return getattr(policy.pi_features_extractor, "token_encoder", nn.Identity()), body, head

    def before_update(self, infos: dict[str, NDArray]) -> None:
        """Called with a rollout's infos, each ``[steps, envs]``, before the algorithm learns from it."""

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn until ``total_steps`` decisions were made."""
        algorithm = self.algorithm
        algorithm.set_logger(logger if self.stages == 1 else _Decisions(logger, self.stages))
        interval = max(1, LOGGED_DECISIONS // (algorithm.n_envs * self.settings.n_steps))
        callback = _RolloutCallback(self, on_rollout)
        algorithm.learn(
            total_steps * self.stages - algorithm.num_timesteps,
            callback=callback,
            log_interval=interval,
            reset_num_timesteps=algorithm.num_timesteps == 0,
        )
        if callback.rollouts % interval:
            algorithm.dump_logs()  # a curve ends with the last rollout

    def policy(self) -> DecisionPolicy:
        """The actor's weights in the project's own network, which decides the same."""
        exported = self.new_policy()
        for ours, theirs in zip((exported.token_encoder, exported.body, exported.head), self._actor(), strict=True):
            ours.load_state_dict(theirs.state_dict())
        return exported.eval()

    def state(self) -> dict[str, Any]:
        """Weights, optimizers, counters, the random states that the library draws from, and the env's state."""
        algorithm = self.algorithm
        _, keys, position, *gauss = np.random.get_state()  # noqa: NPY002  (what the library shuffles with)
        return {
            "parameters": algorithm.get_parameters(),
            "steps": algorithm.num_timesteps,
            "updates": algorithm._n_updates,
            "torch": torch.get_rng_state(),
            "numpy": (torch.from_numpy(keys.astype(np.int64)), position, *gauss),
            "env": self.env.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        algorithm = self.algorithm
        algorithm.set_parameters(state["parameters"])
        algorithm.num_timesteps, algorithm._n_updates = state["steps"], state["updates"]
        # Making the env ready draws instances and random numbers, which the loaded states then take back.
        algorithm._last_obs = algorithm.env.reset()
        observations = self.env.load_state(state["env"])
        algorithm._last_obs = blinded(observations, self.env.core.stages) if self.blind else observations
        algorithm._last_episode_starts = np.ones(algorithm.n_envs, dtype=bool)
        keys, *rest = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(state["torch"])

    def save_extra(self, folder: Path) -> None:
        """Write ``sb3.safetensors``: the parameters of the library's own policy, the critic's too.

        They are read without running any code, as ``PPO.load`` of a zip would: ``model = PPO("MlpPolicy", vec_env)``,
        then ``model.policy.load_state_dict(safetensors.torch.load_file(file))``.
        """
        write_tensors(folder / "sb3.safetensors", self.algorithm.policy.state_dict())
