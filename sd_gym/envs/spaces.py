"""Observations, by keyword, and the spaces of the envs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.envs.protocols import Core, Observations
from sd_gym.projection import OBSERVATION_LIMIT, deviation_of, standardised

if TYPE_CHECKING:  # an env of a table needs no torch
    from torch import Tensor

    from sd_gym.execution.split import BackboneSplit


class Observation(ABC):
    """The observation of an instance before the first layer; ``sd_gym.register_observation`` gives a class a name.

    It is made once per core, as ``Observation(core)``; its statistics come from ``core.split("train")``.

    Attributes:
        space: The space of one observation: a ``Box``, or a ``Dict`` of simple spaces.
        flops: FLOPs of one observation, beyond what the pass computes anyway.
    """

    space: gym.Space
    flops: int = 0

    @abstractmethod
    def observe(self, split: BackboneSplit, rows: Array) -> Observations:
        """Observations of the instances ``rows [n]`` of a split: new arrays, one row per instance.

        A split has ``instances`` (texts), ``encoded`` (tokens), ``features`` and ``backbone``.
        """


class FirstStageObserver:
    """The ``StageObserver`` of a core with one stage: its observation before the first layer."""

    judges, judgements, answer_size = False, 0, 0

    def __init__(self, core: Core) -> None:
        self._core = core
        self.space = core.observation.space

    def observe(
        self, split: Any, rows: Array, stage: int, decisions: Array, resume_from: object
    ) -> tuple[Observations, None]:
        """The core's observation, and no state: nothing runs; see ``StageObserver.observe``."""
        return self._core.observe(split, rows), None


class Standardised(Observation):
    """Features of an instance, standardised: ``Box(-10, 10, (features,), float32)``.

    A subclass gives the features. Their mean and deviation come from the first 2,000 instances of the training split.

    Example:
        >>> class Length(Standardised):
        ...     def features(self, split, rows):
        ...         return split.encoded.source_length[rows, None]
    """

    def __init__(self, core: Core[BackboneSplit]) -> None:
        from sd_gym.tasks.ranking import STATISTICS_SIZE

        split = core.split("train")
        features = self._features(split, np.arange(min(len(split), STATISTICS_SIZE)))
        self.mean = features.mean(axis=0)
        self.deviation = deviation_of(features.std(axis=0))
        self.space = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, self.mean.shape, np.float32)

    @abstractmethod
    def features(self, split: BackboneSplit, rows: Array) -> Array:
        """Finite numbers ``[n, features]`` of the instances ``rows [n]``; ValueError is raised for others."""

    def observe(self, split: BackboneSplit, rows: Array) -> Array:
        """Standardised features, float32 ``[n, features]``, each within ``OBSERVATION_LIMIT``."""
        return standardised(self._features(split, rows), self.mean, self.deviation)

    def _features(self, split: BackboneSplit, rows: Array) -> Array:
        features = np.asarray(self.features(split, rows), dtype=np.float32)
        if features.ndim != 2 or len(features) != len(rows) or not np.isfinite(features).all():
            raise ValueError(
                f"{type(self).__name__}.features has to give finite numbers [{len(rows)}, features], got "
                f"{list(features.shape)}{'' if np.isfinite(features).all() else ', some of them NaN or infinite'}"
            )
        return features


class Pooled(Standardised):
    """Mean and maximum over tokens of the first layer's input, the length and its logarithm."""

    def features(self, split: BackboneSplit, rows: Array) -> Array:
        """``BackboneSplit.features``, float32 ``[n, 2 * width + 2]``."""
        return split.features[rows]

    def of_hidden(self, hidden: Tensor, mask: Tensor) -> Array:
        """The observation of the first layer's input ``[n, length, width]`` and the mask of its tokens."""
        from sd_gym.policy.features import pooled_features

        return standardised(pooled_features(hidden, mask).cpu().numpy(), self.mean, self.deviation)


class Tokens(Observation):
    """The embedded tokens, the first layer's input, for a policy with its own token encoder.

    ``Dict(tokens=Box(-10, 10, (max_source_length, width), float32), mask=MultiBinary(max_source_length))``: each
    channel is standardised over the tokens of the first 2,000 training instances. Padding is 0, at the right, and 0 in
    the mask. Nothing is stored: each batch is embedded when it is observed, in passes of a bounded number of tokens.
    """

    def __init__(self, core: Core[BackboneSplit]) -> None:
        from sd_gym.tasks.ranking import STATISTICS_SIZE

        self.length = core.config.backbone.max_source_length
        split = core.split("train")
        count = 0
        total = np.zeros(1)
        squares = np.zeros(1)
        for _, hidden, mask in self._embedded(split, np.arange(min(len(split), STATISTICS_SIZE))):
            tokens = hidden[mask.bool()].cpu().numpy().astype(np.float64)
            count = count + len(tokens)
            total = total + tokens.sum(axis=0)
            squares = squares + (tokens**2).sum(axis=0)
        mean = total / count
        self.mean = mean.astype(np.float32)
        self.deviation = deviation_of(np.sqrt(np.maximum(squares / count - mean**2, 0)))
        limits = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, (self.length, len(mean)), np.float32)
        self.parts: dict[str, gym.Space] = {"tokens": limits, "mask": gym.spaces.MultiBinary(self.length)}
        self.space = gym.spaces.Dict(self.parts)

    def observe(self, split: BackboneSplit, rows: Array) -> dict[str, Array]:
        """``tokens``, float32 ``[n, max_source_length, width]``, and ``mask``, int8 ``[n, max_source_length]``."""
        tokens = np.zeros((len(rows), self.length, len(self.mean)), dtype=np.float32)
        observations = {"mask": np.zeros((len(rows), self.length), dtype=np.int8), "tokens": tokens}
        for part, *embedded in self._embedded(split, rows):
            write_rows(observations, part, self.of_hidden(*embedded))
        return observations

    def of_hidden(self, hidden: Tensor, mask: Tensor) -> dict[str, Array]:
        """The observation of the first layer's input ``[n, longest, width]`` and the mask of its tokens."""
        from sd_gym.policy.features import token_observations

        return token_observations(hidden, mask, self.mean, self.deviation, self.length)

    def _embedded(self, split: BackboneSplit, rows: Array) -> Iterator[tuple[Array, Tensor, Tensor]]:
        """Per pass: positions in ``rows``, the first layer's input ``[part, longest, width]``, its tokens' mask."""
        from sd_gym.execution.passes import PASS_TOKENS
        from sd_gym.switch import first_layer_input

        board = split.backbone.board
        size = max(1, PASS_TOKENS // self.length)
        for part in np.split(np.arange(len(rows)), range(size, len(rows), size)):
            inputs = split.encoded.inputs(rows[part], board.model.device)
            # A prompt may be a little longer than the limit.
            hidden = first_layer_input(board, inputs)[:, : self.length].float()
            yield part, hidden, inputs["attention_mask"][:, : self.length]


def token_width(space: gym.Space) -> int | None:
    """Width of the tokens, in the space of ``Tokens`` with or without a stage; ``None`` for any other space."""
    if not isinstance(space, gym.spaces.Dict) or set(space) - {"stage"} != {"tokens", "mask"}:
        return None
    tokens, mask = space["tokens"].shape, space["mask"].shape
    return tokens[1] if tokens and len(tokens) == 2 and mask == tokens[:1] else None


def flat_size(space: gym.Space) -> int:
    """How many numbers an observation has besides tokens: all if it is flat, else those of the stage."""
    if isinstance(space, gym.spaces.Dict):
        return flat_size(space["stage"]) if "stage" in space.spaces else 0
    return int(np.prod(space.shape or ()))


def write_rows(observations: Any, rows: Array, new: Observations) -> None:
    """Write the ``new`` observations of some rows in place into those of all rows; dictionaries have the same keys.

    Raises ``ValueError`` unless there is one per row, of the shape of the space.
    """
    if isinstance(new, dict):
        for name, values in new.items():
            write_rows(observations[name], rows, values)
    elif np.shape(new) != (shape := (len(rows), *observations.shape[1:])):
        raise ValueError(
            f"expected observations of the shape {list(shape)}, one per instance, got {list(np.shape(new))}"
        )
    else:
        observations[rows] = new


def joined(parts: Sequence[Any]) -> Observations:
    """Observations of several batches as one batch; all are arrays, or dictionaries with the same keys."""
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


def spaces(core: Core) -> tuple[gym.Space, gym.Space]:
    """Observation and action space of one env: copies, which it may seed."""
    return copy.deepcopy(core.observation_space), copy.deepcopy(core.actions.space)


def unbatched(observations: Observations) -> list[Any]:
    """The observations of a batch as a list, one per instance."""
    if isinstance(observations, dict):
        return [dict(zip(observations, row, strict=True)) for row in zip(*observations.values(), strict=True)]
    return list(observations)


def reward_space(core: Core) -> gym.spaces.Box:
    """Bounds of the vector reward ``[quality, -flops_ratio]``."""
    highest = {"likelihood": 2.0, "balanced": np.inf}.get(core.config.quality.kind, 1.0)
    low, high = np.array([[0.0, -core.highest_flops_ratio], [highest, 0.0]], dtype=np.float32)
    return gym.spaces.Box(low, high, dtype=np.float32)
