"""What is seen at the stages of an episode, in the middle of the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.envs.episodes import StagedEpisodes
from sd_gym.envs.first_look import FirstLook
from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.spaces import Pooled, Tokens
from sd_gym.execution.split import BackboneSplit
from sd_gym.going_on import ANSWER, stages_of_pass
from sd_gym.policy.features import log_odds, pooled_features, stage_observation
from sd_gym.projection import OBSERVATION_LIMIT, deviation_of
from sd_gym.switch import PassState
from sd_gym.tasks.ranking import STATISTICS_SIZE

Array = NDArray
PASS_ROWS = 64  # of a pass that statistics are taken from


class BackboneFirstLook(FirstLook):
    """The ``FirstLook`` of a core that runs a backbone: the pass comes after it, and can be cut by decision."""

    def __init__(self, core: Core[BackboneSplit]) -> None:
        super().__init__(core)
        self._observation = core.observation

    @property
    def of_hidden(self) -> Callable[[Tensor, Tensor], Observations] | None:
        """Takes the first layer's input and the mask of its tokens to what is seen; ``None``: it is made of more."""
        observation = self._observation
        # A subclass, too, may look at something else.
        return observation.of_hidden if type(observation) in (Pooled, Tokens) else None

    def parts(self, split: BackboneSplit, rows: Array, decisions: Array) -> list[Array]:
        """Positions in ``rows`` of each forward pass under decisions ``[n, components]``."""
        return [picked for picked, _ in split.passes.planned(rows, decisions)]


class StageObservation:
    """What is seen at the stages of an episode: which stage it is, and what the pass has computed so far.

    ``Box(-10, 10, (stages + 1 + 2 * width + 2,), float32)``: the stage, one-hot; the share of the dense FLOPs that the
    pass will have taken if all that is left is skipped and an answer has one token; mean and maximum over positions of
    the hidden states there, the number of positions and its logarithm. Where the head can judge what a layer gives
    (``Backbone.can_exit``) there is one number more: the log-odds of its answer there, 0 before the first layer. All
    but the stage and the FLOPs is standardised for each stage by a dense pass over the first 2,000 instances of the
    training split.

    With the stage ``answer`` there are as many numbers more as the head says of its answer (``Answers.judgement``), as
    they are. They are 0 before that stage, which shows them beside what the stage before it has shown.

    Where the env's observation is ``tokens`` that is the ``stage`` of a ``Dict``, beside ``tokens`` and ``mask`` as of
    ``Tokens``: those of the text, at every stage, so that a later one knows all that an earlier one did.
    """

    def __init__(self, core: Core[BackboneSplit], columns: list[slice]) -> None:
        self.names, self.columns = core.stages, columns
        self.judges = core.backbone.can_exit
        self._answer_size = (
            len(core.backbone.head.judgement) if core.has_answer_stage else 0
        )  # numbers of the answer stage
        split = core.split("train")
        rows = np.arange(min(len(split), STATISTICS_SIZE))
        features = np.concatenate(
            [np.stack(list(self._dense(split, part))) for part in np.split(rows, rows[PASS_ROWS::PASS_ROWS])], axis=1
        )
        self.mean, self.deviation = features.mean(axis=1), deviation_of(features.std(axis=1))
        said = slice(features.shape[2] - self._answer_size, None)  # a dense pass is surer of itself than any other
        self.mean[:, said], self.deviation[:, said] = 0, 1
        size = len(self.names) + 1 + features.shape[2]
        shown = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, (size,), np.float32)
        self._tokens = core.observation if isinstance(core.observation, Tokens) else None
        self.space: gym.Space = (
            shown if self._tokens is None else gym.spaces.Dict({"stage": shown, **self._tokens.parts})
        )

    of_hidden = None  # a decision needs more than the first layer's input

    def parts(self, split: BackboneSplit, rows: Array, decisions: Array) -> list[Array]:
        """Positions in ``rows`` of each forward pass: all look in one, which then goes on."""
        return [np.arange(len(rows))]

    @torch.inference_mode()
    def observe(
        self, split: BackboneSplit, rows: Array, stage: int, decisions: Array, resume_from: PassState | None
    ) -> tuple[Observations, PassState | None]:
        """Observations, float32 ``[n, size]``, or with tokens beside them; see ``StageLooks.observe``."""
        decisions = split.costs.masks(decisions)
        features, seen = self._features(split, rows, stage, decisions, resume_from)
        exits = decisions.copy()
        exits[:, self.columns[stage].start : -1] = 1
        share = split.costs.reading_ratio(rows, exits)
        shown = stage_observation(stage, share, features, self.mean, self.deviation)
        if self._tokens is None:
            return shown, seen
        tokens = self._tokens.observe(split, rows)
        return {"mask": tokens["mask"], "stage": shown, "tokens": tokens["tokens"]}, seen

    def episodes(self, core: Core, n: int, info_text: bool) -> StagedEpisodes:
        """A batch of episodes of a step a stage."""
        return StagedEpisodes(core, n, info_text)

    @property
    def around(self) -> tuple[int, int]:
        """How many numbers of an observation stand before the hidden states, and after them."""
        return len(self.names) + 1, self.judges + self._answer_size

    def dense(self, split: BackboneSplit, rows: Array) -> Array:
        """What the stages but ``answer`` show of rows in a dense pass, one after the other, ``[n * stages, size]``."""
        seen = []
        for part in np.split(rows, range(PASS_ROWS, len(rows), PASS_ROWS)):
            stages = zip(stages_of_pass(self.names), self._dense(split, part), strict=False)  # the answer is left out
            for stage, (_, features) in enumerate(stages):
                seen.append(stage_observation(stage, np.zeros(len(part)), features, self.mean, self.deviation))
        return np.concatenate(seen)

    @property
    def judgements(self) -> int:
        """How often the head judges in one episode."""
        return sum(name not in ("first", ANSWER) for name in self.names) if self.judges else 0

    def judging_flops(self, split: BackboneSplit, rows: Array) -> Array:
        """FLOPs of the head's judgements in one episode of each row, int64 ``[n]``."""
        return self.judgements * split.costs.head_flops(rows)

    def _dense(self, split: BackboneSplit, rows: Array) -> Iterator[Array]:
        """Features of each stage of a dense pass, ``[n, features]``."""
        decisions, seen = np.zeros((len(rows), len(split.backbone.board) + 1), dtype=np.int64), None
        features = np.zeros((len(rows), 0))
        for stage, name in enumerate(self.names):
            if name != ANSWER:  # which shows the same, and a judgement, which is not standardised
                features, seen = self._features(split, rows, stage, decisions, seen)
            yield features

    def _features(
        self, split: BackboneSplit, rows: Array, stage: int, decisions: Array, resume_from: PassState | None
    ) -> tuple[Array, PassState | None]:
        if self.names[stage] == ANSWER:
            features, seen = self._features(split, rows, stage - 1, decisions, resume_from)
            features[:, features.shape[1] - self._answer_size :] = split.scoring.judged(rows, decisions, seen)
            return features, None
        judged = np.zeros((len(rows), self.judges + self._answer_size), dtype=np.float32)
        if self.names[stage] == "first":
            return np.concatenate([split.features[rows], judged], axis=1), None
        seen = resume_from
        if seen is None or seen.stage != self.names[stage]:
            seen = split.passes.seen_at(self.names[stage], rows, decisions, resume_from)
        if self.judges:
            judged[:, 0] = log_odds(split.passes.confidence_at(seen, rows, decisions))
        return np.concatenate([pooled_features(seen.hidden, seen.mask).float().cpu().numpy(), judged], axis=1), seen
