"""The batched core of all envs: instances, observations, and the scores of decisions. Its shells hold no logic."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones import load_backbone
from sd_gym.envs.config import ConfigError, EnvConfig
from sd_gym.envs.episodes import EpisodicCore, FirstLook, StageLooks, Steps
from sd_gym.envs.export import Export, of_core
from sd_gym.envs.outcome import Outcome
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import ACTIONS, Actions, MultiDiscreteActions, Observation, Observations, Pooled, Tokens
from sd_gym.envs.staged import StageObservation
from sd_gym.execution.split import BackboneSplit
from sd_gym.objectives import quality_cost
from sd_gym.registration import OBSERVATIONS
from sd_gym.switch import PassState
from sd_gym.tasks.ranking import RANKINGS
from sd_gym.tasks.splits import Splits

Array = NDArray


class BackboneCore(EpisodicCore):
    """Draws instances, observes them, and scores decisions on them; shared by all envs of the same configuration.

    Args:
        config: The env's configuration.

    Attributes:
        data: The splits of the data set.
        actions: How an agent says its decisions.
        observation: What it sees before the first layer.
        stages: Names of the stages of an episode, in execution order.
        columns: Which switches each stage decides.
        steps: Which components of a decision each stage makes.

    Raises:
        FileNotFoundError: If the data set, the backbone or the codebook does not exist.
        ConfigError: If the codebook or a stage is none of this backbone.
        sd_gym.tasks.data.DataError: If the data set is malformed.
        sd_gym.switch.UnsupportedArchitectureError: If the backbone cannot be switched.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config = config
        self.backbone = load_backbone(config.backbone.name, config.backbone.device)
        self.data = Splits(config.data, config.task)
        self._splits: dict[str, BackboneSplit] = {}
        board = self.backbone.board
        try:
            self.columns = list(board.decided_at(config.stages).values())
        except ValueError as error:
            raise ConfigError(f"{config.id}: config key 'stages': {error}") from error
        self.stages = list(board.decided_at(config.stages))
        if config.observation == "tokens" and "first" not in self.stages:
            raise ConfigError(
                f"{config.id}: config key 'stages': observation tokens is seen at the stage first; got {self.stages}"
            )
        self.steps = self._steps()
        self.actions: Actions = ACTIONS[config.action](config, self.steps.choices)
        self._decided = MultiDiscreteActions(config, self.nvec)
        self.observation: Observation = OBSERVATIONS.find(config.observation)(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of an env, in this process or another, shares the core of its configuration."""
        return shared_core, (self.config,)

    def _steps(self) -> Steps:
        """Each stage decides its switches, the first of an action; at ``first`` the tokens too, which come last."""
        widest = max(columns.stop - columns.start for columns in self.columns)
        components, places = [], []
        for name, columns in zip(self.stages, self.columns, strict=True):
            own, at = np.arange(columns.start, columns.stop), np.arange(columns.stop - columns.start)
            tokens = name == "first"
            components.append(np.append(own, len(self.nvec) - 1) if tokens else own)
            places.append(np.append(at, widest) if tokens else at)
        return Steps(components, places, self.nvec)

    @cached_property
    def stage_observation(self) -> StageLooks:
        """What is seen at the stages."""
        return StageObservation(self) if self.is_staged else FirstLook(self)

    @property
    def observation_space(self) -> gym.Space:
        """Of one observation."""
        return self.stage_observation.space

    @property
    def highest_flops_ratio(self) -> float:
        """A bound on the FLOPs ratio of any decision: above 1 where ranking tokens runs a part of the backbone."""
        drops = len(self.config.tokens.shares) > 1
        return 2.0 if drops and RANKINGS.find(self.config.tokens.ranking).costs_flops else 1.0

    @property
    def n_switches(self) -> int:
        """Number of switches of the backbone."""
        return len(self.backbone.board)

    @cached_property
    def nvec(self) -> Array:
        """Sizes of the action's components, int64 ``[switches + 1]``: of each switch, then the number of token levels.

        A switch has 2 choices; 1, to run, where its kind is not among the config's ``candidates``.
        """
        sizes = [1 + (switch.sublayer.kind in self.config.candidates) for switch in self.backbone.board.switches]
        return np.array([*sizes, len(self.config.tokens.shares)], dtype=np.int64)

    @property
    def decision_nvec(self) -> Array:
        """Sizes of a mask's components; here a decision is a mask, but not so of every table."""
        return self.nvec

    @property
    def switch_names(self) -> list[str]:
        """What each component of a decision but the last one skips."""
        return self.backbone.board.names

    def to_masks(self, decisions: Array) -> Array:
        """Decisions ``[n, components]`` as masks, int64 ``[n, switches + 1]``: here they are."""
        return np.array(decisions, dtype=np.int64)

    def from_masks(self, masks: Array) -> Array:
        """Masks ``[n, switches + 1]`` as decisions, int64 ``[n, components]``: here they are, too."""
        return np.array(masks, dtype=np.int64)

    def split(self, name: str) -> BackboneSplit:
        """A split by name, loaded when first asked for."""
        if name not in self._splits:
            self._splits[name] = BackboneSplit(self.config, name, self.data)
        return self._splits[name]

    def scores(self) -> dict[str, dict[str, torch.Tensor]]:
        """What is known of each split (``Scoring.scores``), by its name."""
        return {name: split.scoring.scores() for name, split in self._splits.items()}

    def load_scores(self, scores: dict[str, dict[str, torch.Tensor]]) -> None:
        """Know these scores and no others.

        A likelihood differs in its last bits with the batch that it is computed in, so what a run has scored before
        belongs to the run: it neither takes over what another one in this process has scored, nor scores again what it
        had before it was cut off.
        """
        for name in {*self._splits, *scores}:
            self.split(name).scoring.load_scores(scores.get(name))

    def export(self) -> Export | None:
        """What a policy takes along when it leaves this env; ``None``: it cannot."""
        return of_core(self)

    def observe(self, split: BackboneSplit, rows: Array) -> Observations:
        """What the configured observation shows of rows ``[n]`` of a split: new arrays, a row an instance."""
        return self.observation.observe(split, rows)

    def decided_logits(
        self, split: BackboneSplit, rows: Array, decide: Callable[[Observations], Array]
    ) -> Iterator[tuple[Array, Tensor, Tensor]]:
        """Observe rows, decide on them and run them: positions in ``rows``, logits and labels of each forward pass.

        A single row is decided on in its pass, where the observation is made of the first layer's input and no other
        look at the input is needed to rank tokens. Of several stages all rows are, in one pass that is stopped at
        each.

        Args:
            split: Where the instances are.
            rows: Their rows, int64 ``[n]``.
            decide: From observations to decisions ``[n, switches + 1]``.
        """
        if self.is_staged:
            decisions, seen = self.walk(split, rows, decide)
            if seen is None:
                yield from split.passes.logits(rows, decisions)
            else:
                yield np.arange(len(rows)), *split.passes.resumed(seen, rows, decisions)
            return
        looks = len(self.config.tokens.shares) > 1 and split.tokens.ranking.costs_flops
        if len(rows) == 1 and type(self.observation) in (Pooled, Tokens) and not looks:
            observation = self.observation
            yield (
                np.zeros(1, dtype=np.int64),
                *split.passes.logits_of_one(rows[0], lambda hidden, mask: decide(observation.of_hidden(hidden, mask))),
            )
        else:
            yield from split.passes.logits(rows, decide(self.observe(split, rows)))

    def score(self, split: BackboneSplit, rows: Array, decisions: Array, seen: PassState | None = None) -> Outcome:
        """What comes of one decision an instance; one batched run of the backbone.

        Args:
            split: Where the instances are.
            rows: Their rows, int64 ``[n]``.
            decisions: ``[n, switches + 1]``.
            seen: What a pass of these rows under these decisions has shown at a stage: then it goes on from there.

        Raises:
            ValueError: If the decisions are malformed.
        """
        decisions = self._decided.decisions(decisions, len(rows))
        quality, quality_ref = split.scoring.quality(rows, decisions, seen)
        flops_ratio = split.costs.flops_ratio(rows, decisions)
        cost = quality_cost(quality, quality_ref, self.config.reward.epsilon)
        return Outcome(quality, quality_ref, cost, flops_ratio)


@lru_cache(maxsize=8)
def core_of(config: EnvConfig, observation: type) -> BackboneCore:
    """As ``shared_core``, which passes the observation's class: a name may come to stand for another one."""
    return BackboneCore(config)


def _shared_split(config: EnvConfig, name: str) -> BackboneSplit:
    return shared_core(config).split(name)


# A split is never copied, as its core is not.
copyreg.pickle(BackboneSplit, lambda split: (_shared_split, (split.config, split.name)))
