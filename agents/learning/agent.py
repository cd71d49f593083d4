"""The one interface of all agents."""

from __future__ import annotations

import difflib
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
from pydantic import Field
from sd_gym.agents.learning.decisions import Version, versions
from sd_gym.agents.learning.warm_start import staged_from_single, staged_from_tokens
from stable_baselines3.common.logger import Logger
from torch import nn

from sd_gym.config import StrictModel
from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.envs.vector import SwitchableVectorEnv
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.choices import Noise
from sd_gym.policy.observations import to_tensors
from sd_gym.policy.token_encoder import TokenEncoder, affordable_channels
from sd_gym.tasks.ranking import STATISTICS_SIZE

BLIND_REFINING_RATE = 1e-3  # learning rate of a blind agent with a start
FIRST_LOOK = 256  # texts that untrained token encoders are standardised by
TOKENS_DROPPED = 0.1  # how often, before anything is learned, of two token levels the one that drops some is chosen
SURENESS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # log-odds, of versions that accept answers more easily, or less
START_FIELDS = ("stages", "observation_size", "channels", "token_width", "nvec", "switches", "network", "hidden")
INFO_TAGS = ("quality", "quality_ref", "flops_ratio")
INFO_KEYS = (*INFO_TAGS, "is_success")


class NotApplicableError(ValueError):
    """An agent that cannot be had on an env, such as early exit where a text is generated; nothing is wrong with it."""


class AgentSettings(StrictModel):
    """Settings of an agent; each agent has its own subclass, every field of it can be set by name.

    Attributes:
        num_envs: Instances decided on in one step, scored by one batched run of the backbone.
        space: What ``sd-gym tune`` searches, by setting: a list of choices, or the bounds of a positive number whose
            logarithm is drawn evenly. Defaults lie within.
    """

    space: ClassVar[dict[str, list[Any] | tuple[float, float]]] = {}

    num_envs: int = Field(256, ge=1)


class LearnerSettings(AgentSettings):
    """Settings of all agents that learn.

    Attributes:
        learning_rate: Of Adam at the start; it falls to 0 in a straight line until the last decision: selection makes a
            policy that still changes over-cautious. With a ``start`` the default is lower.
        entropy: Weight of the entropy bonus.
        initial_skip_rate: How often each switch is skipped before anything is learned. At even odds every decision
            tells most about all switches; near the dense backbone learning takes several times as long.
        start: Folder of a run whose policy learning goes on from (a warm start), such as one of ``static`` or
            ``imitation``. Then ``initial_skip_rate`` plays no part, and ``learning_rate`` is by default 2e-4 of PPO,
            5e-5 of A2C and REINFORCE, and 1e-3 of blind agents.
        network: Name of a policy network of your own (``sd_gym.register_network``); ``None``: two hidden layers.
        channels: Of the token encoder that reads tokens where they are observed; ``None``: 48, or as many as cost 1% of
            the dense FLOPs, or those of the ``start``.
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
        for tag in INFO_TAGS:
            logger.record(f"rollout/{tag}", float(np.mean(self.infos[tag])))


OnRollout = Callable[[Rollout], None]
SettingsT = TypeVar("SettingsT", bound=AgentSettings)


class BaseAgent(ABC, Generic[SettingsT]):
    """What ``Agent``, which has a policy, and ``PrivilegedAgent``, whose decisions need more, share.

    It learns on ``env``, draws from ``seed`` and, if ``blind``, sees zeros instead of the observation; ``settings`` are
    fields of ``Settings``. Raises ``ValueError`` if a setting is unknown or out of range.
    """

    Settings: ClassVar[type[AgentSettings]] = AgentSettings
    is_control: ClassVar[bool] = False  # whether it is only there to be compared with, and does not learn
    staged: ClassVar[bool] = False  # whether it takes envs of several stages, else of one before the first layer
    draws: ClassVar[bool] = True  # whether it is compared with several seeds
    selects: ClassVar[bool] = True  # whether an operating point is selected; else its only one is evaluated

    def __init__(self, env: SwitchableVectorEnv, *, seed: int = 0, blind: bool = False, **settings: Any) -> None:
        self.settings = cast(SettingsT, self.make_settings(settings, blind))  # ``Settings`` is that class
        check_learnable(env, type(self).staged)
        self.env = env
        self.seed = seed
        self.blind = blind

    @classmethod
    def make_settings(cls, settings: dict[str, Any], blind: bool = False) -> AgentSettings:
        """Checked settings, defaults included; arguments and errors are those of the class."""
        known = list(cls.Settings.model_fields)
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown setting {key!r} of {cls.__name__}{hint} Known: {', '.join(known)}.")
        return cls.Settings(**settings)

    @abstractmethod
    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn until ``total_steps`` decisions were made, those before a ``load_state`` included.

        ``on_rollout`` is called after each rollout and its update; ``logger.dump(steps)`` makes a point of a curve.
        """

    @abstractmethod
    def operating_points(self) -> Sequence[Version]:
        """What there is to select from after learning, in any order: policies, or what decides on rows of a split.

        Selection (``sd_gym.agents.experiment.selection``) orders the points on policy rows from dense to bold, and
        tests them in that order on the validation split. So no point may depend on the validation or test split.
        Dense is always there, and need not be named. ``Version(policy)`` makes a point of a ``DecisionPolicy`` or of
        a ``SplitPolicy``, and ``versions(core, policy)`` makes those of one policy, from cautious to bold.
        """

    def save_extra(self, folder: Path) -> None:
        """Write what is kept beside the policy, such as the critic."""


class PrivilegedAgent(BaseAgent[SettingsT]):
    """A control that decides by more than the observation: by the answers, or by what the layers compute.

    It is selected as the policies are and evaluated beside them, but cannot be timed, exported or learned from.
    """

    staged = is_control = True


class Agent(BaseAgent[SettingsT]):
    """Learns, searches or has a policy: decisions by the observation alone."""

    searches: ClassVar[bool] = False  # whether it has no policy as learned, and policy rows choose one of its points
    per_stage: bool = False  # whether each of several stages has hidden layers of its own
    validates: ClassVar[bool] = True  # whether the policy grows with every rollout, so that it is validated on the way
    refining_rate: ClassVar[float | None] = None  # the default learning rate with a start; None: as without one

    def __init__(self, env: SwitchableVectorEnv, *, seed: int = 0, blind: bool = False, **settings: Any) -> None:
        super().__init__(env, seed=seed, blind=blind, **settings)
        self._network, self._channels, folder = None, None, None
        if isinstance(self.settings, LearnerSettings):
            self._network, self._channels, folder = self.settings.network, self.settings.channels, self.settings.start
        self.start: DecisionPolicy | None = None  # kept, as its folder may be gone when learning has ended
        self.per_stage = type(self).per_stage and len(env.core.stages) > 1 and self._network is None
        if folder is not None:
            self.start = self._load_start(folder)

    @classmethod
    def make_settings(cls, settings: dict[str, Any], blind: bool = False) -> AgentSettings:
        """Checked settings; with a ``start`` the default learning rate is low, to keep what it knows, unless blind."""
        if cls.refining_rate is not None and settings.get("start") is not None:
            settings = {"learning_rate": BLIND_REFINING_RATE if blind else cls.refining_rate, **settings}
        return super().make_settings(settings, blind)

    @abstractmethod
    def policy(self) -> DecisionPolicy:
        """The current policy as an artefact of its own, independent of the agent."""

    def selectable_policies(self) -> list[DecisionPolicy]:
        """Policies to select from after learning: the last one, and its start, which refining so never falls below."""
        return [self.policy(), *([] if self.start is None else [self.start])]

    def operating_points(self) -> list[Version]:
        """The versions of all policies to select from; of those with an answer stage also surer and less sure ones."""
        core, points = self.env.core, list[Version]()
        for policy in self.selectable_policies():
            variants = [policy.with_sureness(margin) for margin in SURENESS] if core.has_answer_stage else [policy]
            points += [one._replace(learned=policy) for variant in variants for one in versions(core, variant)]
        return points

    def state(self) -> dict[str, Any]:
        """All that learning depends on, as tensors and plain values; agents that search have none, and start again."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""

    def new_policy(self, *, blind: bool | None = None, noise: Noise = "none") -> DecisionPolicy:
        """A policy for this env, untrained; it is blind if the agent is, unless told otherwise."""
        core, channels = self.env.core, self.channels
        width, flat = token_width(core.observation_space), flat_size(core.observation_space)
        with torch.random.fork_rng(devices=[]):  # to export a policy draws nothing from the agent's randomness
            torch.manual_seed(self.seed)
            return DecisionPolicy(
                flat or width or 0,
                core.nvec.tolist(),
                core.switch_names,
                blind=self.blind if blind is None else blind,
                noise=noise,
                network=self._network,
                stages=core.stages,
                per_stage=self.per_stage,
                channels=channels,
                token_width=width if flat else None,
            )

    def _standardise_encoders(self, *networks: nn.Module) -> None:
        """Standardise what untrained token encoders in networks make of the first texts of the training split."""
        encoders = [module for network in networks for module in network.modules() if isinstance(module, TokenEncoder)]
        if encoders:
            core, split = self.env.core, self.env.core.split("train")
            texts = token_tensors(core.observe(split, np.arange(min(len(split), FIRST_LOOK))))
            for encoder in encoders:
                encoder.standardise_on(texts)

    @cached_property
    def channels(self) -> int | None:
        """Of a policy's token encoder, where tokens are observed; else ``None``."""
        core = self.env.core
        width = token_width(core.observation_space)
        if width is None:
            return None
        split = core.split("train")
        rows = np.arange(min(len(split), STATISTICS_SIZE))
        dense = split.costs.dense_flops(rows).sum() / split.encoded.source_length[rows].sum()
        return self._channels or affordable_channels(width, dense, len(core.stages))

    def _constant_policy(self, logits: torch.Tensor, noise: Noise = "none") -> DecisionPolicy:
        """The same logits ``[sum(nvec)]`` for every input, which it does not look at."""
        policy = self.new_policy(blind=True, noise=noise)
        with torch.no_grad():
            policy.head.weight.zero_()
            policy.head.bias.copy_(logits)
        return policy.eval()

    def _load_start(self, folder: Path) -> DecisionPolicy:
        """The policy that a warm start begins with; one of a single stage is made one of several."""
        start, core = DecisionPolicy.load(folder), self.env.core
        if self.channels is not None and start.channels is not None and self._channels is None:
            self.channels = start.channels
        if core.stages[0] == "first" and len(core.stages) > 1 and start.stages == ["first"]:
            self.per_stage = True
            return self._staged_start(start, folder)
        self.per_stage = start.per_stage and len(core.stages) > 1
        _check_start(start, self.new_policy(), folder)
        start.blind = self.blind
        return start

    def _staged_start(self, start: DecisionPolicy, folder: Path) -> DecisionPolicy:
        """A policy for all stages that decides as nearly as it can as one that decides at the first one."""
        staged, core = self.new_policy(), self.env.core
        _check_start(start, staged, folder, ("nvec", "switches", "network", "hidden"))
        refused = f"the policy in {folder} cannot be a start here:"
        if start.channels != staged.channels:
            raise ValueError(
                f"{refused} its channels are {start.channels}, expected {staged.channels}; both see tokens "
                "(observation=tokens), or neither"
            )
        before = len(staged.stages) + 1  # numbers in front of what the first stage shows
        expected = staged.token_width or staged.observation_size - before - core.stage_observation.judges
        if start.observation_size != expected:
            kind = f"{start.observation_size} features, expected {expected}, of pooled states or of a token"
            raise ValueError(f"{refused} it sees {kind}")
        if start.channels is not None:
            return staged_from_tokens(start, staged)
        split = core.split("train")
        rows = np.arange(min(len(split), STATISTICS_SIZE))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return staged_from_single(start, staged, core, split, rows)


def token_tensors(observations: Observations) -> dict[str, torch.Tensor]:
    """Observations of tokens as tensors."""
    made = to_tensors(observations)
    assert isinstance(made, dict)  # it is asked for only where tokens are observed
    return made


def _check_start(
    start: DecisionPolicy, expected: DecisionPolicy, folder: Path, names: tuple[str, ...] = START_FIELDS
) -> None:
    """Raise ``ValueError`` if the start in a folder differs from what is expected in one of these attributes."""
    for name in names:
        has, needs = getattr(start, name), getattr(expected, name)
        if has != needs:
            raise ValueError(f"the policy in {folder} cannot be a start here: its {name} is {has}, expected {needs}")


def check_learnable(env: SwitchableVectorEnv, staged: bool = False) -> None:
    """Raise ``ValueError`` if agents cannot learn on an env, ``NotApplicableError`` if only ``staged`` ones can."""
    if not env.core.actions.are_decisions:
        raise ValueError(
            f"the agents of sd_gym decide by action=multi_discrete, got action={env.config.action}; leave it out (an "
            "agent of another library can have it: docs/envs.md)"
        )
    if env.core.is_staged and not staged:
        raise NotApplicableError(
            f"this agent decides once, before the first layer, but the stages of this env are {env.core.stages}; leave "
            "stages out, or take an agent that decides in stages (ppo, a2c, reinforce, imitation)"
        )
    if env.config.reward.vector:
        raise ValueError("the agents of sd_gym learn from one number, got reward.vector=True; leave it out")
    space = env.single_observation_space
    if token_width(space) is None and (not isinstance(space, gym.spaces.Box) or len(space.shape) != 1):
        raise ValueError(
            "the agents of sd_gym see flat observations or tokens: observation=pooled, observation=tokens, or a "
            "registered one whose space is a Box of one dimension or such as that of tokens; got "
            f"observation={env.config.observation} with the space {space}"
        )


def initial_bias(nvec: NDArray, skip_rate: float) -> torch.Tensor:
    """Logits, float32 ``[sum(nvec)]``, that choose other than 0 with ``skip_rate`` where there are two choices."""
    return decision_logits(nvec, np.zeros(len(nvec), dtype=np.int64), 1 - skip_rate)


def learning_bias(core: Core, skip_rate: float) -> torch.Tensor:
    """Logits, float32 ``[sum(nvec)]``, that learning begins with: switches are skipped with ``skip_rate``.

    Tokens are mostly kept: an input that lost them mostly lost its answer too, which teaches nothing about switches.
    """
    parts = [initial_bias(core.nvec[[component]], skip_rate) for component in range(len(core.nvec))]
    if core.switch_names:  # else there is no token level, but the number of a mask
        level = len(core.switch_names)
        parts[level] = initial_bias(core.nvec[[level]], min(skip_rate, TOKENS_DROPPED))
    return torch.cat(parts)


def decision_logits(nvec: NDArray, decision: NDArray, confidence: float) -> torch.Tensor:
    """Logits, float32 ``[sum(nvec)]``, that make a decision ``[components]``; ``confidence`` is that of two choices."""
    half = 0.5 * float(np.log(confidence / (1 - confidence)))
    sizes = zip(nvec, decision, strict=True)
    return torch.cat([torch.where(torch.arange(int(size)) == int(choice), half, -half) for size, choice in sizes])
