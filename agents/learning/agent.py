"""The one interface of all agents."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from sd_gym.agents.learning.decisions import Version, versions
from sd_gym.agents.learning.warm_start import check_start, read_start, staged_start
from stable_baselines3.common.logger import Logger
from torch import nn

from sd_gym.config import RewardConfig, StrictModel
from sd_gym.envs.protocols import SCORES, Core
from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.envs.vector import SwitchableVectorEnv
from sd_gym.errors import first_problem
from sd_gym.policy import HIDDEN, DecisionPolicy, blinded
from sd_gym.policy.choices import Noise
from sd_gym.policy.networks import hidden_layers
from sd_gym.policy.observations import to_tensors
from sd_gym.policy.token_encoder import TokenEncoder, affordable_channels
from sd_gym.registry import nearest
from sd_gym.tasks.ranking import STATISTICS_SIZE

BLIND_REFINING_RATE = 1e-3  # learning rate of a blind agent with a start
ENCODER_STATISTICS_SIZE = 256  # texts that untrained token encoders are standardised on
TOKENS_DROPPED = 0.1  # initial rate at which the second of two token levels is chosen
INFO_KEYS = (*SCORES, "is_success")

Values = TypeVar("Values", bound=StrictModel)


class NotApplicableError(ValueError):
    """An agent that does not apply to an env, such as early exit to text generation; this is no defect."""


def checked_settings(kind: type[Values], values: dict[str, Any], owner: str) -> Values:
    """Settings of an agent, its ``owner``; ``ValueError`` with the name of the first one that is wrong."""
    try:
        return kind(**values)
    except ValidationError as error:
        name, problem = first_problem(error)
        raise ValueError(f"setting {name!r} of {owner}: {problem}" if name else f"{owner}: {problem}") from error


class AgentSettings(StrictModel):
    """Settings of an agent, set by name. Each agent has its own subclass.

    Attributes:
        num_envs: Instances per step, scored by one batched run of the backbone.
        space: What ``sd-gym tune`` searches, by setting: a list of choices, or the bounds of a positive number whose
            logarithm is drawn evenly. Defaults lie within.
    """

    space: ClassVar[dict[str, list[Any] | tuple[float, float]]] = {}

    num_envs: int = Field(256, ge=1)


class LearnerSettings(AgentSettings):
    """Settings of all agents that learn.

    Attributes:
        learning_rate: Learning rate of Adam at the start. It falls linearly to 0, because a policy that still changes
            is selected too cautiously; imitation's does not, as it stops on held-out rows. With a ``start`` the default
            is lower.
        entropy: Weight of the entropy bonus.
        initial_skip_rate: How often each switch is skipped at first. Decisions at 0.5 tell most about all switches;
            near 0 learning takes several times as long.
        start: Folder of the run to start from (a warm start), such as one of ``static`` or ``imitation``. It replaces
            ``initial_skip_rate``, and the default ``learning_rate`` is then 2e-4 for PPO, 5e-5 for A2C and REINFORCE,
            and 1e-3 for blind agents.
        network: Name of a policy network of your own (``sd_gym.register_network``); ``None``: two hidden layers.
        channels: Channels of the token encoder. ``None``: those of the ``start``, or else 48, or as many as cost 1% of
            the dense FLOPs.
    """

    space: ClassVar = {"learning_rate": (2e-4, 1e-2), "initial_skip_rate": [0.1, 0.3, 0.5]}

    learning_rate: float = Field(1e-3, gt=0)
    entropy: float = Field(0.0, ge=0)
    initial_skip_rate: float = Field(0.5, gt=0, lt=1)
    start: Path | None = None
    network: str | None = None
    channels: int | None = Field(None, ge=1)


@dataclass
class Rollout:
    """Outcomes of one rollout, one value per decision, which is an episode."""

    steps: int  # decisions made so far, this rollout included
    rewards: NDArray  # [n]
    infos: dict[str, NDArray]  # ``quality``, ``quality_ref``, ``flops_ratio`` and ``is_success``, each [n]
    stages: int = 1  # steps of an episode

    def record(self, logger: Logger) -> None:
        """Record the tags that all agents have: means over this rollout."""
        logger.record("rollout/ep_rew_mean", float(np.mean(self.rewards)))
        logger.record("rollout/ep_len_mean", float(self.stages))
        logger.record("rollout/success_rate", float(np.mean(self.infos["is_success"])))
        for tag in SCORES:
            logger.record(f"rollout/{tag}", float(np.mean(self.infos[tag])))


OnRollout = Callable[[Rollout], None]
SettingsT = TypeVar("SettingsT", bound=AgentSettings)


class BaseAgent(ABC, Generic[SettingsT]):
    """Base class of ``Agent``, which has a policy, and ``PrivilegedAgent``, which decides by more than observations.

    It learns on ``env`` and draws from ``seed``; if ``blind``, it observes zeros. ``settings`` are fields of
    ``Settings``. Raises ``ValueError`` if a setting is unknown or out of range.
    """

    Settings: ClassVar[type[AgentSettings]] = AgentSettings
    is_control: ClassVar[bool] = False  # whether it is a control baseline
    staged: ClassVar[bool] = False  # whether it can decide at several stages, or only before the first layer
    draws: ClassVar[bool] = True  # whether its result depends on the seed, so that comparisons train it with several
    selects: ClassVar[bool] = True  # whether an operating point is selected; else its only one is evaluated
    # Whether it trains no policy. "As learned" is then its cheapest point that loses at most epsilon on policy rows.
    searches: ClassVar[bool] = False
    uses_reward: ClassVar[bool] = True  # whether it learns from the env's reward, by whatever objective

    def __init__(self, env: SwitchableVectorEnv, *, seed: int = 0, blind: bool = False, **settings: Any) -> None:
        self.settings = cast(SettingsT, self.make_settings(settings, blind))  # ``Settings`` is that class
        check_learnable(env, type(self).staged)
        self._warn_of_reward(env.config.reward)
        self.env = env
        self.seed = seed
        self.blind = blind

    @classmethod
    def make_settings(cls, settings: dict[str, Any], blind: bool = False) -> AgentSettings:
        """Checked settings, defaults included; arguments and errors are those of the class."""
        known = list(cls.Settings.model_fields)
        if key := next((key for key in settings if key not in known), None):
            hint = nearest(key, known)
            raise ValueError(f"unknown setting {key!r} of {cls.__name__}{hint} Known: {', '.join(known)}.")
        return checked_settings(cls.Settings, settings, cls.__name__)

    def _warn_of_reward(self, reward: RewardConfig) -> None:
        """Warn if the env's reward was changed in a way that this agent does not see."""
        if not self.uses_reward and (reward.objective != RewardConfig().objective or reward.gains != "counted"):
            warnings.warn(
                f"{type(self).__name__} does not learn from the env's reward, so objective={reward.objective} and "
                f"gains={reward.gains} change its curves only; ppo and a2c learn from it",
                stacklevel=3,
            )

    @abstractmethod
    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn until ``total_steps`` decisions were made, including those before a ``load_state``.

        ``on_rollout`` is called after each rollout and its update; ``logger.dump(steps)`` writes a point of the curves.
        """

    @abstractmethod
    def operating_points(self) -> Sequence[Version]:
        """The candidates of selection after learning, in any order.

        Selection (``sd_gym.agents.experiment.selection``) orders the points on policy rows from dense to bold, and
        tests them in that order on the validation split. So no point may depend on the validation or test split.
        Dense is always a candidate. ``Version(policy)`` makes a point of a ``DecisionPolicy`` or a ``SplitPolicy``;
        ``versions(core, policy)`` makes those of one policy, from cautious to bold.
        """

    def save_extra(self, folder: Path) -> None:
        """Write further files into the run folder, such as the critic."""


class PrivilegedAgent(BaseAgent[SettingsT]):
    """A control that uses more than the observation: the answers, or what the layers compute.

    It is selected and evaluated like policies, but cannot be timed, exported or learned from.
    """

    staged = is_control = searches = True

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Do nothing, unless a subclass learns."""


class Agent(BaseAgent[SettingsT]):
    """An agent whose policy uses the observation alone."""

    per_stage: bool = False  # whether each of several stages has hidden layers of its own
    validates: ClassVar[bool] = True  # whether the policy is validated during learning, as it changes with each rollout
    refining_rate: ClassVar[float | None] = None  # the default learning rate with a start; None: the usual one

    def __init__(self, env: SwitchableVectorEnv, *, seed: int = 0, blind: bool = False, **settings: Any) -> None:
        super().__init__(env, seed=seed, blind=blind, **settings)
        own = self.settings if isinstance(self.settings, LearnerSettings) else LearnerSettings.model_construct()
        self._network = own.network
        self._channels = own.channels
        self.per_stage = type(self).per_stage and len(env.core.stages) > 1 and self._network is None
        self.start: DecisionPolicy | None = None
        if own.start is not None:
            self.start = self._load_start(own.start)

    @classmethod
    def make_settings(cls, settings: dict[str, Any], blind: bool = False) -> AgentSettings:
        """Checked settings; with a ``start`` the default learning rate is low, to keep what it has learned."""
        if cls.refining_rate is not None and settings.get("start") is not None:
            settings = {"learning_rate": BLIND_REFINING_RATE if blind else cls.refining_rate, **settings}
        return super().make_settings(settings, blind)

    @abstractmethod
    def policy(self) -> DecisionPolicy:
        """The current policy, independent of the agent."""

    def selectable_policies(self) -> list[DecisionPolicy]:
        """Policies to select from after learning: the last one, and its start, in case refining made it worse."""
        return [self.policy(), *([] if self.start is None else [self.start])]

    def operating_points(self) -> list[Version]:
        """Versions of all policies to select from."""
        return [version for policy in self.selectable_policies() for version in versions(self.env.core, policy)]

    def state(self) -> dict[str, Any]:
        """What learning depends on, as tensors and plain values; empty for agents that search and so start again."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state``."""

    def new_policy(self, *, blind: bool | None = None, noise: Noise = "none", hidden: int = HIDDEN) -> DecisionPolicy:
        """An untrained policy for this env; ``blind=None``: blind if the agent is."""
        core = self.env.core
        channels = self.channels
        start = self.start
        width, flat = token_width(core.observation_space), flat_size(core.observation_space)
        with torch.random.fork_rng(devices=[]):  # exporting a policy does not change the agent's random state
            torch.manual_seed(self.seed)
            return DecisionPolicy(
                flat or width or 0,
                core.nvec.tolist(),
                core.switch_names,
                blind=self.blind if blind is None else blind,
                noise=noise,
                network=self._network,
                hidden=hidden,
                codebook=None if start is None or start.codebook is None else start.codebook.tolist(),
                stages=core.stages,
                per_stage=self.per_stage,
                channels=channels,
                token_width=width if flat else None,
                graded=start is not None and start.graded and not core.is_staged,
            )

    def _observe(self, rows: NDArray) -> Any:
        """Observations of ``rows [n]`` of the env's split before the first layer, as tensors; zeros if blind."""
        core = self.env.core
        observations = to_tensors(core.observe(core.split(core.config.split), rows))
        return blinded(observations, ["first"]) if self.blind else observations

    def _standardise_encoders(self, *networks: nn.Module) -> None:
        """Standardise the features of untrained token encoders on the first texts of the training split."""
        encoders = [module for network in networks for module in network.modules() if isinstance(module, TokenEncoder)]
        if encoders:
            core, split = self.env.core, self.env.core.split("train")
            texts: Any = to_tensors(core.observe(split, np.arange(min(len(split), ENCODER_STATISTICS_SIZE))))
            for encoder in encoders:
                encoder.standardise_on(texts)

    @cached_property
    def channels(self) -> int | None:
        """Channels of a policy's token encoder; ``None`` if no tokens are observed."""
        core = self.env.core
        width = token_width(core.observation_space)
        if width is None:
            return None
        split = core.split("train")
        rows = np.arange(min(len(split), STATISTICS_SIZE))
        dense = split.costs.dense_flops(rows).sum() / split.encoded.source_length[rows].sum()
        return self._channels or affordable_channels(width, dense, len(core.stages))

    def _constant_policy(self, logits: torch.Tensor, noise: Noise = "none") -> DecisionPolicy:
        """A policy with the same logits ``[sum(nvec)]`` for every input."""
        policy = self.new_policy(blind=True, noise=noise)
        with torch.no_grad():
            policy.head.weight.zero_()
            policy.head.bias.copy_(logits)
        return policy.eval()

    def _initialise(self, network: DecisionPolicy) -> None:
        """Give a network the weights of the start, or the initial skip rates."""
        assert isinstance(self.settings, LearnerSettings)
        if self.start is not None:
            network.load_state_dict(self.start.state_dict(), strict=False)
        else:
            network.initialise(learning_bias(self.env.core, self.settings.initial_skip_rate))

    def _load_start(self, folder: Path) -> DecisionPolicy:
        """The policy to start from. One that decides once is converted to several stages, if none is the answer."""
        start, core = read_start(folder, self.env.core, blind=self.blind), self.env.core
        if self.channels is not None and start.channels is not None and self._channels is None:
            self.channels = start.channels
        # A policy that decides once has no preference at an answer.
        if core.stages[0] == "first" and core.is_staged and not core.has_answer_stage and start.stages == ["first"]:
            self.per_stage = True
            return staged_start(start, self.new_policy(), core, folder, self.seed)
        self.per_stage = start.per_stage and len(core.stages) > 1
        check_start(start, self.new_policy(), folder)
        start.blind = self.blind
        return start


def observation_layers(space: gym.Space, hidden: int) -> nn.Sequential:
    """Layers from observations to ``hidden`` features; the token encoder is wide, as its FLOPs do not count."""
    width, size = token_width(space), flat_size(space)
    if width is None:
        return hidden_layers(size, hidden)
    encoder = TokenEncoder(width, stage_size=size)
    return nn.Sequential(encoder, *hidden_layers(encoder.size, hidden))


def check_learnable(env: SwitchableVectorEnv, staged: bool) -> None:
    """Raise ``ValueError`` if agents cannot learn on an env, ``NotApplicableError`` if only ``staged`` ones can."""
    if not env.core.actions.are_decisions:
        raise ValueError(
            f"the agents of sd_gym decide by action=multi_discrete, got action={env.config.action}; leave it out (an "
            "agent of another library can have it: docs/envs.md)"
        )
    if env.core.is_staged and not staged:
        raise NotApplicableError(
            f"this agent decides once, before the first layer, but the stages of this env are {env.core.stages}; leave "
            "stages out, or take an agent that decides in stages (ppo, a2c, ppo_lagrangian, ppo_lex, "
            "reinforce, imitation)"
        )
    if env.config.reward.vector:
        raise ValueError("the agents of sd_gym learn from one number, got reward.vector=True; leave it out")
    space = env.single_observation_space
    if token_width(space) is None and (not isinstance(space, gym.spaces.Box) or len(space.shape) != 1):
        raise ValueError(
            "the agents of sd_gym read flat observations or tokens: observation=pooled, observation=tokens, or a "
            "registered one whose space is a Box of one dimension or like that of tokens; got "
            f"observation={env.config.observation} with the space {space}"
        )


def learning_bias(core: Core, skip_rate: float) -> torch.Tensor:
    """Initial logits, float32 ``[sum(nvec)]``: switches are skipped with ``skip_rate``.

    Most tokens are kept: an input without them mostly loses its answer, which says nothing about the switches.
    """
    rates = np.full(len(core.nvec), skip_rate)
    if core.switch_names:  # else the components are indices of masks
        rates[len(core.switch_names)] = min(skip_rate, TOKENS_DROPPED)
    return decision_logits(core.nvec, np.zeros_like(core.nvec), 1 - rates)


def decision_logits(nvec: NDArray, decision: NDArray, confidence: float | NDArray) -> torch.Tensor:
    """Logits, float32 ``[sum(nvec)]``, of a decision ``[components]``.

    ``confidence`` is the probability of each component's choice if it has two.
    """
    halves = np.broadcast_to(0.5 * np.log(confidence / (1 - confidence)), len(nvec)).tolist()
    parts = zip(nvec, decision, halves, strict=True)
    return torch.cat([torch.where(torch.arange(int(size)) == int(choice), half, -half) for size, choice, half in parts])
