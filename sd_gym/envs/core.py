"""The core of an env that runs a backbone: instances, observations, and the scores of decisions."""

import copyreg
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray as Array
from torch import Tensor

from sd_gym.backbones import load_backbone
from sd_gym.backbones.load import BUNDLED
from sd_gym.config import ConfigError, EnvConfig
from sd_gym.envs.actions import StageActions, actions_of
from sd_gym.envs.export import Export
from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.spaces import FirstStageObserver, Observation, Pooled, Tokens
from sd_gym.envs.staged import BackboneStageObserver
from sd_gym.execution.split import BackboneSplit
from sd_gym.files import file_states
from sd_gym.going_on import ANSWER, answer_masks, stages_of_pass
from sd_gym.policy.artefact import reading_hash, tokenizer_hash
from sd_gym.policy.token_rule import TokenRule
from sd_gym.registration import OBSERVATIONS
from sd_gym.tasks.family import TASKS
from sd_gym.tasks.metrics import METRICS
from sd_gym.tasks.ranking import RANKINGS
from sd_gym.tasks.splits import Splits


class BackboneCore(Core[BackboneSplit]):
    """Draws instances, observes them, and scores decisions on them; shared by all envs of the same configuration.

    Raises:
        FileNotFoundError: If the data set, the backbone or the codebook does not exist.
        ConfigError: If the codebook or a stage does not fit this backbone.
        sd_gym.errors.DataError: If the data set is malformed.
        sd_gym.switch.UnsupportedArchitectureError: If the backbone cannot be switched.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config = config
        self.backbone = load_backbone(config.backbone.name, config.backbone.device)
        self.data = Splits.of_env(config)
        self._splits: dict[str, BackboneSplit] = {}
        board, tokens = self.backbone.board, config.tokens
        answers = ANSWER in config.stages
        try:
            decided_at = board.decided_at(stages_of_pass(config.stages))
        except ValueError as error:
            raise ConfigError(f"{config.id}: config key 'stages': {error}; {ANSWER!r} may be the last one") from error
        if answers and not self.backbone.head.judgement:
            raise ConfigError(
                f"{config.id}: config key 'stages': at the stage {ANSWER} the head judges its answer, but the backbone "
                f"{config.backbone.name!r} predicts a score, which has no probability; leave {ANSWER} out"
            )
        self.stages = [*decided_at, *[ANSWER] * answers]
        self.columns = [*decided_at.values(), *[slice(len(board), len(board))] * answers]
        if config.observation == "tokens" and "first" not in self.stages:
            raise ConfigError(
                f"{config.id}: config key 'stages': observation tokens needs the stage first; got {self.stages}"
            )
        self.switch_names = board.names
        # A switch has 2 choices, or 1 (to run) if its kind is not among the candidates. The token level is last.
        choices = [1 + (switch.sublayer.kind in config.candidates) for switch in board.switches]
        mask = [*choices, len(tokens.shares)]
        self.mask_nvec = np.array(mask, dtype=np.int64)
        self.nvec = np.array([*mask, *[2] * answers], dtype=np.int64)
        self._ranking = RANKINGS.find(tokens.ranking) if len(tokens.shares) > 1 else None  # no token is dropped
        self.highest_flops_ratio = 1.0 + answers + bool(self._ranking and self._ranking.costs_flops)
        self.stage_actions = self._stage_actions()
        self.actions = actions_of(config, self.stage_actions.choices)
        self.observation: Observation = OBSERVATIONS.find(config.observation)(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is the shared core of the same configuration, in this process or another."""
        return backbone_core, (self.config,)

    @property
    def can_exit(self) -> bool:
        """Whether the head can judge the output of any layer."""
        return self.backbone.head.can_exit(self.backbone.board)

    def _stage_actions(self) -> StageActions:
        """In an action the stage's switches come first.

        The stage ``first`` also decides the token level, which is last. The stage ``answer`` has one component: whether
        to go on.
        """
        level = len(self.mask_nvec) - 1
        others = {"first": [level], ANSWER: [level + 1]}  # components that are no switches
        stages = zip(self.stages, self.columns, strict=True)
        own = [np.array([*range(at.start, at.stop), *others.get(name, ())], dtype=np.int64) for name, at in stages]
        return StageActions(own, self.nvec, level=level)

    @cached_property
    def stage_observer(self) -> BackboneStageObserver | FirstStageObserver:
        """The observations at the stages."""
        return BackboneStageObserver(self, self.columns) if self.is_staged else FirstStageObserver(self)

    def to_masks(self, decisions: Array) -> Array:
        """Decisions ``[n, components]`` as masks, int64 ``[n, switches + 1]``: without going on."""
        return np.array(decisions[:, : len(self.mask_nvec)], dtype=np.int64)

    def from_masks(self, masks: Array) -> Array:
        """Masks ``[n, switches + 1]`` as decisions, int64 ``[n, components]``, whose answers are accepted."""
        return np.pad(np.array(masks, dtype=np.int64), ((0, 0), (0, int(self.has_answer_stage))))

    def split(self, name: str) -> BackboneSplit:
        """A split by name, loaded on first use."""
        if name not in self._splits:
            self._splits[name] = BackboneSplit(self.config, name, self.data)
        return self._splits[name]

    def scores(self) -> dict[str, dict[str, torch.Tensor]]:
        """The cached scores of each split (``Scoring.scores``), by its name."""
        return {name: split.scoring.scores() for name, split in self._splits.items()}

    def load_scores(self, scores: dict[str, dict[str, torch.Tensor]]) -> None:
        """Replace the cached scores.

        The last bits of a likelihood depend on the batch that it is computed in. So a run keeps its own scores when it
        is resumed, and does not share those of another run in the same process.
        """
        for name in {*self._splits, *scores}:
            self.split(name).scoring.load_scores(scores.get(name))

    def export(self) -> Export | None:
        """What a policy needs outside of this env.

        ``None`` if a policy needs the env: the observation or token ranking is a user's own, or tokens rank at random.
        """
        config = self.config
        backbone = self.backbone
        ranking = self._ranking
        observation = self.observation
        if not isinstance(observation, Pooled | Tokens) or (ranking is not None and not ranking.is_exported):
            return None
        train, name = self.split("train"), config.backbone.name
        described = {
            "name": name,
            "is_local": Path(name).exists() or name in BUNDLED,
            "model_type": backbone.model.config.model_type,
            "auto_class": backbone.head.loading(backbone.model.config)[0],
            "weights": backbone.weights,
            "tokenizer": tokenizer_hash(backbone.tokenizer),
            "reading": reading_hash(backbone.tokenizer),
            "token_types": train.encoded.token_type_ids is not None,
        }
        context = train.encoded.context_mask if self.has_answer_stage else None  # spans alone have a context
        stages, token_statistics = self.stage_observer, None
        statistics = observation
        if isinstance(stages, BackboneStageObserver):
            statistics = stages
            if isinstance(observation, Tokens):
                token_statistics = observation.mean, observation.deviation
        return Export(
            env=config,
            backbone=described,
            mean=statistics.mean,
            deviation=statistics.deviation,
            rarity=train.rarity if ranking is not None and ranking.needs_rarity else None,
            protection=None if ranking is None else _rule_for(train, train.tokens.droppable),
            token_statistics=token_statistics,
            ranking_costs_flops=ranking is not None and ranking.costs_flops,
            # Without the first token, which stands for no answer.
            context=None if context is None else _rule_for(train, np.pad(context.numpy()[:, 1:], ((0, 0), (1, 0)))),
        )

    def decided_logits(
        self, split: BackboneSplit, rows: Array, decide: Callable[[Observations], Array]
    ) -> Iterator[tuple[Array, Tensor, Tensor]]:
        """Observe rows, decide on them and run them: positions in ``rows``, logits and labels of each forward pass.

        A single row is decided on during its pass, if observation and token ranking need the first layer's input alone.
        With several stages all rows are decided on in one pass, which stops at each stage.
        """
        observation, ranking = self.observation, self._ranking
        alone = len(rows) == 1 and not self.is_staged and not (ranking is not None and ranking.costs_flops)
        # A subclass may need more than the first layer's input.
        if alone and isinstance(observation, Pooled | Tokens) and type(observation) in (Pooled, Tokens):
            of_hidden = observation.of_hidden
            one = split.passes.logits_of_one(rows[0], lambda hidden, mask: decide(of_hidden(hidden, mask)))
            yield np.zeros(1, dtype=np.int64), *one
            return
        decisions, state = self.rollout(split, rows, decide)
        decisions = answer_masks(decisions, len(self.mask_nvec))
        if state is None:
            yield from split.passes.logits(rows, decisions)
        else:
            yield np.arange(len(rows)), *split.passes.resumed(state, rows, decisions)


def backbone_core(config: EnvConfig) -> BackboneCore:
    """The core of a configuration without a ``table``.

    A new one is made if a name that it uses was registered again, or a file that it reads was rewritten.
    """
    metric, task = METRICS.find(config.quality.metric), TASKS.find(config.task)
    found = OBSERVATIONS.find(config.observation), metric, task, RANKINGS.find(config.tokens.ranking)
    read = config.data.dataset, config.backbone.name, *([config.codebook] if config.codebook else [])
    return _backbone_core(config, found, tuple(map(file_states, read)))


@lru_cache(maxsize=8)
def _backbone_core(config: EnvConfig, found: tuple[Any, ...], read: tuple[Any, ...]) -> BackboneCore:
    """The core of a configuration, cached also by what its names stand for and by the state of its files."""
    return BackboneCore(config)


def _rule_for(train: BackboneSplit, tokens: Array) -> TokenRule | None:
    """The rule by which exactly ``tokens``, bool ``[n, longest]``, may be dropped; ``None``: there is none."""
    tokenizer = train.backbone.tokenizer
    added = tokenizer("", "").input_ids  # tokens around texts and between them
    separator = added[-1] if added else None
    encoded = train.encoded
    return TokenRule.find(encoded.input_ids, encoded.source_length, tokens, sorted(set(added)), separator)


# A copy of a split is the shared split of the shared core.
copyreg.pickle(BackboneSplit, lambda split: (BackboneCore.split, (backbone_core(split.config), split.name)))
