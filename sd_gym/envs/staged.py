"""Observations at the stages of an episode, in the middle of the pass."""

from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray as Array

from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.spaces import Tokens
from sd_gym.execution.split import BackboneSplit
from sd_gym.going_on import ANSWER, stages_of_pass
from sd_gym.policy.features import log_odds, pooled_features, stage_observation
from sd_gym.projection import OBSERVATION_LIMIT, deviation_of
from sd_gym.switch import PassState
from sd_gym.tasks.ranking import STATISTICS_SIZE

PASS_ROWS = 64  # rows per pass when statistics are computed


class BackboneStageObserver:
    """Observations at the stages of an episode: the stage, and what the pass has computed so far.

    ``Box(-10, 10, (stages + 1 + 2 * width + 2,), float32)``:

    * the stage, one-hot;
    * the pass's share of the dense FLOPs, if all the rest is skipped and an answer has one token;
    * mean and maximum over positions of the hidden states, the number of positions and its logarithm;
    * where the head can judge the output of a layer (``Head.can_exit``), the log-odds of its answer there, 0 before
      the first layer;
    * with the stage ``answer``, the head's judgement of its answer (``Answers.judgement``), 0 until that stage. It is
      not standardised. The rest of that stage is as at the stage before.

    All but stage, FLOPs and judgement is standardised per stage by a dense pass over the first 2,000 instances of the
    training split.

    If the env's observation is ``tokens``, this is the ``stage`` of a ``Dict``. The ``tokens`` and ``mask`` of the text
    are there at every stage, as of ``Tokens``, so a later stage knows all that an earlier one did.
    """

    def __init__(self, core: Core[BackboneSplit], columns: list[slice]) -> None:
        self.names = core.stages
        self.columns = columns
        self.judges = core.can_exit
        self.judgements = self.judges * sum(name not in ("first", ANSWER) for name in self.names)
        self.answer_size = len(core.backbone.head.judgement) if core.has_answer_stage else 0
        split = core.split("train")
        rows = np.arange(min(len(split), STATISTICS_SIZE))
        features = np.concatenate(
            [np.stack(list(self._dense(split, part))) for part in np.split(rows, rows[PASS_ROWS::PASS_ROWS])], axis=1
        )
        self.mean = features.mean(axis=1)
        self.deviation = deviation_of(features.std(axis=1))
        judged = slice(features.shape[2] - self.answer_size, None)  # not standardised: too sure in a dense pass
        self.mean[:, judged], self.deviation[:, judged] = 0, 1
        size = len(self.names) + 1 + features.shape[2]
        self.space: gym.Space = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, (size,), np.float32)
        self._tokens = core.observation if isinstance(core.observation, Tokens) else None
        if self._tokens is not None:
            self.space = gym.spaces.Dict({"stage": self.space, **self._tokens.parts})

    @torch.inference_mode()
    def observe(
        self, split: BackboneSplit, rows: Array, stage: int, decisions: Array, resume_from: PassState | None
    ) -> tuple[Observations, PassState | None]:
        """Observations, float32 ``[n, size]``, or a dictionary with tokens; see ``StageObserver.observe``."""
        decisions = split.costs.masks(decisions)
        features, state = self._features(split, rows, stage, decisions, resume_from)
        exits = decisions.copy()
        exits[:, self.columns[stage].start : -1] = 1
        share = split.costs.reading_ratio(rows, exits)
        observed = stage_observation(stage, share, features, self.mean, self.deviation)
        if self._tokens is None:
            return observed, state
        tokens = self._tokens.observe(split, rows)
        return {"mask": tokens["mask"], "stage": observed, "tokens": tokens["tokens"]}, state

    @property
    def around(self) -> tuple[int, int]:
        """Sizes of the parts of an observation before and after the hidden states."""
        return len(self.names) + 1, self.judges + self.answer_size

    def dense(self, split: BackboneSplit, rows: Array) -> Array:
        """Observations of rows in a dense pass, at the stages except ``answer``, ``[n * stages, size]``."""
        observed = []
        for part in np.split(rows, range(PASS_ROWS, len(rows), PASS_ROWS)):
            stages = zip(stages_of_pass(self.names), self._dense(split, part), strict=False)  # the answer is left out
            for stage, (_, features) in enumerate(stages):
                observed.append(stage_observation(stage, np.zeros(len(part)), features, self.mean, self.deviation))
        return np.concatenate(observed)

    def _dense(self, split: BackboneSplit, rows: Array) -> Iterator[Array]:
        """Features of each stage of a dense pass, ``[n, features]``."""
        decisions, state = np.zeros((len(rows), len(split.backbone.board) + 1), dtype=np.int64), None
        features = np.zeros((len(rows), 0))
        for stage, name in enumerate(self.names):
            if name != ANSWER:  # it differs from the stage before only by the judgement, which is not standardised
                features, state = self._features(split, rows, stage, decisions, state)
            yield features

    def _features(
        self, split: BackboneSplit, rows: Array, stage: int, decisions: Array, resume_from: PassState | None
    ) -> tuple[Array, PassState | None]:
        if self.names[stage] == ANSWER:
            features, state = self._features(split, rows, stage - 1, decisions, resume_from)
            features[:, features.shape[1] - self.answer_size :] = split.scoring.judged(rows, decisions, state)
            return features, None
        judged = np.zeros((len(rows), self.judges + self.answer_size), dtype=np.float32)
        if self.names[stage] == "first":
            return np.concatenate([split.features[rows], judged], axis=1), None
        state = resume_from
        if state is None or state.stage != self.names[stage]:
            state = split.passes.state_at(self.names[stage], rows, decisions, resume_from)
        if self.judges:
            judged[:, 0] = log_odds(split.passes.confidence_at(state, rows, decisions))
        return np.concatenate([pooled_features(state.hidden, state.mask).cpu().numpy(), judged], axis=1), state
