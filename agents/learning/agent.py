"""The one interface of all agents."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.learning.decisions import Decided
from sd_gym.agents.learning.warm import in_stages, with_token_encoder
from stable_baselines3.common.logger import Logger
from torch import nn

from sd_gym.config import StrictModel
from sd_gym.envs.protocols import Core, Split
from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.envs.vector import SwitchableVectorEnv
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.observations import to_tensors
from sd_gym.policy.token_encoder import TokenEncoder, affordable_channels
from sd_gym.tasks.ranking import STATISTICS_SIZE

BLIND_REFINING_RATE = 1e-3  # learning rate of a blind agent with a start
FIRST_LOOK = 256  # texts that untrained token encoders are standardised by
TOKENS_DROPPED = 0.1  # how often, before anything is learned, of two token levels the one that drops some is chosen
SAME = ("stages", "observation_size", "channels", "token_width", "nvec", "switches", "network", "hidden")  # of a start
INFO_TAGS = ("quality", "quality_ref", "flops_ratio")
INFO_KEYS = (*INFO_TAGS, "is_success")


class NotApplicableError(ValueError):
    """An agent that cannot be had on an env, such as early exit where a text is generated; nothing is wrong with it."""


class AgentSettings(StrictModel):
    """Settings of an agent; each agent has its own subclass, every field of it can be set by name.

    Attributes:
        num_envs: Of the vector env that ``train`` makes for the agent: instances decided on in one step, scored by one
            batched run of the backbone.
        space: What ``sd-gym tune`` searches, by setting: a list of choices, or the bounds of a positive number whose
            logarithm is drawn evenly. Defaults lie within.
    """

    space: ClassVar[dict[str, list[Any] | tuple[float, float]]] = {}

    num_envs: int = Field(256, ge=1)


class LearnerSettings(AgentSettings):
    """What all agents that learn share.

    Attributes:
        learning_rate: Of Adam at the start; it falls to 0 in a straight line until the last decision: what a policy
            ends with has to be calm, or selection makes it over-cautious. With a ``start`` the default is lower.
        entropy: Weight of the entropy bonus.
        initial_skip_rate: How often each switch is skipped before anything is learned. At even odds every decision
            tells most about all switches; near the dense backbone learning takes several times as long. Tokens are
            mostly kept at first (``learning_bias``).
        start: Folder of a run whose policy learning goes on from (a warm start), such as one of ``static`` or
            ``imitation``; then ``initial_skip_rate`` plays no part, and ``learning_rate`` is by default 2e-4 of PPO,
            5e-5 of A2C and REINFORCE, and 1e-3 of blind agents.
        network: Name of a policy network of your own (``sd_gym.register_network``); ``None``: two hidden layers.
        channels: Of the token encoder that reads tokens where they are observed (``sd_gym.policy.token_encoder``);
            ``None``: 48, or as many as cost 1% of the dense FLOPs, or those of the ``start``.
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
    """What came of the decisions of one rollout, one value a decision, which is an episode.

    Attributes:
        steps: Decisions made so far, this rollout included.
        rewards: ``[n]``.
        infos: ``quality``, ``quality_ref``, ``flops_ratio`` and ``is_success``, each ``[n]``.
        stages: Steps of an episode.
    """

    steps: int
    rewards: NDArray
    infos: dict[str, NDArray]
    stages: int = 1

    def record(self, logger: Logger) -> None:
        """Record the tags that all agents have: means over this rollout."""
        logger.record("rollout/ep_rew_mean", float(np.mean(self.rewards)))
        logger.record("rollout/ep_len_mean", float(self.stages))
        logger.record("rollout/success_rate", float(np.mean(self.infos["is_success"])))
        for tag in INFO_TAGS:
            logger.record(f"rollout/{tag}", float(np.mean(self.infos[tag])))


OnRollout = Callable[[Rollout], None]


class BaseAgent(ABC):
    """What the two kinds share: ``Agent``, which comes to a policy, and ``Decider``, whose decisions need more.

    Args:
        env: What it learns on.
        seed: Of all that it draws.
        blind: Whether it sees zeros instead of the observation.
        settings: Fields of ``Settings``.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    Settings: ClassVar[type[AgentSettings]] = AgentSettings
    is_control: ClassVar[bool] = False  # whether it is only there to be compared with, and does not learn
    staged: ClassVar[bool] = False  # whether it takes envs of several stages, else of one before the first layer
    draws: ClassVar[bool] = True  # whether it is compared with several seeds

    def __init__(self, env: SwitchableVectorEnv, *, seed: int = 0, blind: bool = False, **settings: Any) -> None:
        self.settings = self.make_settings(settings, blind)
        check_learnable(env, type(self).staged)
        self.env = env
        self.seed = seed
        self.blind = blind

    @classmethod
    def make_settings(cls, settings: dict[str, Any], blind: bool = False) -> AgentSettings:
        """Checked settings, those that were not given by their defaults.

        Args:
            settings: Fields of ``Settings``.
            blind: Whether the agent sees zeros instead of the observation.

        Raises:
            ValueError: If a setting is unknown or out of range.
        """
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

        ``on_rollout`` is called after each rollout and the update that it leads to; ``logger.dump(steps)`` makes a
        point of what was recorded.
        """

    def save_extra(self, folder: Path) -> None:  # noqa: B027  (most keep nothing)
        """Write what is kept beside the policy, such as the critic."""


class Decider(BaseAgent):
    """Decides on a whole split by more than the observation, as no policy can: by the answers, or by what layers say.

    So it is evaluated beside the policies, but cannot be timed, taken along or learned from.
    """

    staged = is_control = True

    @abstractmethod
    def decided(self, split: Split) -> Decided:
        """Its decisions on all instances of a split, and what it costs to make them."""


class Agent(BaseAgent):
    """Learns, searches or has a policy: decisions by the observation alone.

    Args:
        env: What it learns on.
        seed: Of its weights and exploration.
        blind: Whether it sees zeros instead of the observation.
        settings: Fields of ``Settings``.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    selects: ClassVar[bool] = True  # whether the policy to keep is chosen on the validation split
    searches: ClassVar[bool] = False  # whether it searches policies on the first half of the validation split
    per_stage: bool = False  # whether each of several stages has hidden layers of its own
    validates: ClassVar[bool] = True  # whether the policy grows with every rollout, so that it is validated on the way
    refining_rate: ClassVar[float | None] = None  # the default learning rate with a start; None: as without one

    def __init__(self, env: SwitchableVectorEnv, *, seed: int = 0, blind: bool = False, **settings: Any) -> None:
        super().__init__(env, seed=seed, blind=blind, **settings)
        self.start: DecisionPolicy | None = None  # kept, as its folder may be gone when learning has ended
        self.per_stage = (
            type(self).per_stage and len(env.core.stages) > 1 and getattr(self.settings, "network", None) is None
        )
        if (folder := getattr(self.settings, "start", None)) is not None:
            self.start = self._load_start(folder)

    @classmethod
    def make_settings(cls, settings: dict[str, Any], blind: bool = False) -> AgentSettings:
        """Checked settings; with a ``start``, the default learning rate is low, or what was found there is lost.

        A blind agent has no more than its biases to learn, so it may be faster.
        """
        if cls.refining_rate is not None and settings.get("start") is not None:
            settings = {"learning_rate": BLIND_REFINING_RATE if blind else cls.refining_rate, **settings}
        return super().make_settings(settings, blind)

    @abstractmethod
    def policy(self) -> DecisionPolicy:
        """The current policy as an artefact of its own, independent of the agent."""

    def offers(self) -> list[DecisionPolicy]:
        """Policies to select from when learning has ended: what it ended with, and what it went on from, if anything.

        So refining cannot end behind its start.
        """
        return [self.policy(), *([] if self.start is None else [self.start])]

    def state(self) -> dict[str, Any]:
        """Everything that learning depends on, as tensors and plain values; called from within ``on_rollout``.

        Agents that search instead of learning have none: they start again and find the same.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""

    def new_policy(self, **kwargs: Any) -> DecisionPolicy:
        """A policy for this env, untrained; ``kwargs`` as of ``DecisionPolicy``."""
        core, channels = self.env.core, self.channels
        width, flat = token_width(core.observation_space), flat_size(core.observation_space)
        kwargs = {
            "blind": self.blind,
            "per_stage": self.per_stage,
            "network": getattr(self.settings, "network", None),
        } | kwargs
        with torch.random.fork_rng(devices=[]):  # to export a policy draws nothing from the agent's randomness
            torch.manual_seed(self.seed)
            known = core.nvec.tolist(), core.switch_names
            encoder = {"channels": channels, "token_width": width if flat else None}
            return DecisionPolicy(flat or width, *known, stages=core.stages, **encoder, **kwargs)

    def _begin(self, *networks: nn.Module) -> None:
        """Standardise what untrained token encoders in networks make of the first texts of the training split."""
        encoder = [module for network in networks for module in network.modules() if isinstance(module, TokenEncoder)]
        if encoder:
            core = self.env.core
            split = core.split("train")
            seen = to_tensors(core.observe(split, np.arange(min(len(split), FIRST_LOOK))))
            for one in encoder:
                one.standardise_on(seen)

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
        return getattr(self.settings, "channels", None) or affordable_channels(width, dense, len(core.stages))

    def _constant_policy(self, logits: torch.Tensor, **kwargs: Any) -> DecisionPolicy:
        """The same logits ``[sum(nvec)]`` for every input, which it does not look at."""
        policy = self.new_policy(blind=True, **kwargs)
        with torch.no_grad():
            policy.head.weight.zero_()
            policy.head.bias.copy_(logits)
        return policy.eval()

    def _load_start(self, folder: Path) -> DecisionPolicy:
        """Load the policy of the run that a warm start begins with; that of one stage is made one of several.

        Raises:
            FileNotFoundError: If the folder holds none.
            ValueError: If it decides on something else.
        """
        start, core = DecisionPolicy.load(folder), self.env.core
        if self.channels is not None and start.channels is not None and self.settings.channels is None:
            self.channels = start.channels
        if core.stages[0] == "first" and len(core.stages) > 1 and start.stages == ["first"]:
            self.per_stage = True
            return self._in_stages(start, folder)
        self.per_stage = start.per_stage and len(core.stages) > 1
        check_same(start, self.new_policy(), folder)
        start.blind = self.blind
        return start

    def _in_stages(self, start: DecisionPolicy, folder: Path) -> DecisionPolicy:
        """A policy for all stages of the env that decides as nearly as it can as one that decides at the first one."""
        staged = self.new_policy()
        check_same(start, staged, folder, ("nvec", "switches", "network", "hidden"))
        if start.channels != staged.channels:
            raise ValueError(
                f"the policy in {folder} cannot be a start here: its channels are {start.channels}, expected "
                f"{staged.channels}; both see tokens (observation=tokens), or neither"
            )
        taken = len(staged.stages) + 1  # in front of what the first stage shows
        expected = staged.token_width or staged.observation_size - taken - self.env.core.stage_observation.judges
        if start.observation_size != expected:
            raise ValueError(
                f"the policy in {folder} cannot be a start here: it sees {start.observation_size} features, expected "
                f"{expected}, of pooled states or of a token"
            )
        if start.channels is not None:
            return with_token_encoder(start, staged)
        core, split = self.env.core, self.env.core.split("train")
        rows = np.arange(min(len(split), STATISTICS_SIZE))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return in_stages(start, staged, core, split, rows)


def check_same(
    start: DecisionPolicy,
    expected: DecisionPolicy,
    folder: Path,
    names: tuple[str, ...] = SAME,
) -> None:
    """Raise ``ValueError`` if a start, of the run in a folder, is in one of these ways not as it is expected to be."""
    for name in names:
        if getattr(start, name) != getattr(expected, name):
            raise ValueError(
                f"the policy in {folder} cannot be a start here: its {name} is {getattr(start, name)}, expected "
                f"{getattr(expected, name)}"
            )


def check_learnable(env: SwitchableVectorEnv, staged: bool = False) -> None:
    """Raise ``ValueError`` if an env's actions, observations or rewards are none that the agents here take.

    Where only this agent does not take them, it is a ``NotApplicableError``.

    Args:
        env: The env.
        staged: Whether the agent takes several stages.
    """
    if env.config.action != "multi_discrete" and env.config.table is None:  # a table's masks have numbers
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
    """Logits of all components such that each is other than 0 with ``skip_rate`` where it has two choices.

    Returns:
        float32 ``[sum(nvec)]``.
    """
    return decision_logits(nvec, np.zeros(len(nvec), dtype=np.int64), 1 - skip_rate)


def learning_bias(core: Core, skip_rate: float) -> torch.Tensor:
    """Logits that learning begins with: each switch is skipped with ``skip_rate``, and tokens are mostly kept.

    At even odds, an input that has lost its tokens has mostly lost its answer too, whatever its switches do: an agent
    is certain of them before it has seen what they do where the tokens are kept.

    Returns:
        float32 ``[sum(nvec)]``.
    """
    bias, levels = initial_bias(core.nvec, skip_rate), int(core.nvec[-1])
    if levels > 1 and core.switch_names:  # else the last component is no token level, but the number of a mask
        bias[-levels:] = initial_bias(core.nvec[-1:], min(skip_rate, TOKENS_DROPPED))
    return bias


def decision_logits(nvec: NDArray, decision: NDArray, confidence: float) -> torch.Tensor:
    """Logits of all components, float32 ``[sum(nvec)]``, that make ``decision``.

    Args:
        nvec: Sizes of the components.
        decision: The choice of each component.
        confidence: Probability of the choice where there are two.
    """
    half = 0.5 * float(np.log(confidence / (1 - confidence)))
    choices = [
        torch.where(torch.arange(int(size)) == int(choice), half, -half)
        for size, choice in zip(nvec, decision, strict=True)
    ]
    return torch.cat(choices)
