"""What an agent sees, by keyword, and the spaces of the shells."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.protocols import Core, Observations
from sd_gym.projection import OBSERVATION_LIMIT, deviation_of

if TYPE_CHECKING:  # an env of a table needs no torch
    from torch import Tensor

    from sd_gym.execution.split import BackboneSplit

Array = NDArray


class Observation(ABC):
    """What an agent sees of an instance before it decides; ``sd_gym.register_observation`` gives a class a name.

    It is made once a core, as ``Observation(core)``; what it needs to standardise comes from ``core.split("train")``.

    Attributes:
        space: Of one observation: a ``Box``, or a ``Dict`` of simple spaces.
        flops: Of making one observation, beyond what the pass computes anyway.
    """

    space: gym.Space
    flops: int = 0

    @abstractmethod
    def observe(self, split: BackboneSplit, rows: Array) -> Observations:
        """New arrays of what is seen of the instances ``rows [n]`` of a split, a row an instance.

        A split has ``instances`` (texts), ``encoded`` (tokens), ``features`` and ``backbone``.
        """


class Standardised(Observation):
    """Features of an instance, standardised: ``Box(-10, 10, (features,), float32)``.

    A subclass says which features; their mean and deviation come from the first 2,000 instances of the training split.

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
        """Numbers ``[n, features]`` of the instances ``rows [n]``."""

    def observe(self, split: BackboneSplit, rows: Array) -> Array:
        """Standardised features, float32 ``[n, features]``, each within ``OBSERVATION_LIMIT``."""
        return self.standardised(self._features(split, rows))

    def standardised(self, features: Array) -> Array:
        """Features ``[n, features]`` by the training split's mean and deviation."""
        return np.clip((features - self.mean) / self.deviation, -OBSERVATION_LIMIT, OBSERVATION_LIMIT)

    def _features(self, split: BackboneSplit, rows: Array) -> Array:
        return np.asarray(self.features(split, rows), dtype=np.float32)


class Pooled(Standardised):
    """Mean and maximum over tokens of the first layer's input, the length and its logarithm."""

    def features(self, split: BackboneSplit, rows: Array) -> Array:
        """As ``Split.features``."""
        return split.features[rows]

    def of_hidden(self, hidden: Tensor, mask: Tensor) -> Array:
        """What is observed of the first layer's input ``[n, length, width]`` and the mask of its tokens."""
        from sd_gym.policy.features import pooled_features

        return self.standardised(pooled_features(hidden, mask).float().cpu().numpy())


class Tokens(Observation):
    """The embedded tokens, the first layer's input, for a policy with a token encoder of its own.

    ``Dict(tokens=Box(-10, 10, (max_source_length, width), float32), mask=MultiBinary(max_source_length))``: each
    channel is standardised over the tokens of the first 2,000 training instances; padding is 0, at the right, and 0 in
    the mask. Nothing is stored: each batch is embedded when it is looked at, in passes of a bounded number of tokens.
    """

    def __init__(self, core: Core[BackboneSplit]) -> None:
        from sd_gym.tasks.ranking import STATISTICS_SIZE

        self.length = core.config.backbone.max_source_length
        split = core.split("train")
        count, total, squares = 0, np.zeros(1), np.zeros(1)
        for _, hidden, mask in self._embedded(split, np.arange(min(len(split), STATISTICS_SIZE))):
            kept = hidden[mask.bool()].cpu().numpy().astype(np.float64)
            count, total, squares = count + len(kept), total + kept.sum(axis=0), squares + (kept**2).sum(axis=0)
        mean = total / count
        self.mean = mean.astype(np.float32)
        self.deviation = deviation_of(np.sqrt(np.maximum(squares / count - mean**2, 0)))
        limits = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, (self.length, len(mean)), np.float32)
        self.parts: dict[str, gym.Space] = {"tokens": limits, "mask": gym.spaces.MultiBinary(self.length)}
        self.space = gym.spaces.Dict(self.parts)

    def observe(self, split: BackboneSplit, rows: Array) -> dict[str, Array]:
        """``tokens``, float32 ``[n, max_source_length, width]``, and ``mask``, int8 ``[n, max_source_length]``."""
        tokens = np.zeros((len(rows), self.length, len(self.mean)), dtype=np.float32)
        seen = {"mask": np.zeros((len(rows), self.length), dtype=np.int8), "tokens": tokens}
        for part, *embedded in self._embedded(split, rows):
            put(seen, part, self.of_hidden(*embedded))
        return seen

    def of_hidden(self, hidden: Tensor, mask: Tensor) -> dict[str, Array]:
        """What is observed of the first layer's input ``[n, longest, width]`` and the mask of its tokens."""
        from sd_gym.policy.features import token_observations

        return token_observations(hidden, mask, self.mean, self.deviation, self.length)

    def _embedded(self, split: BackboneSplit, rows: Array) -> Iterator[tuple[Array, Tensor, Tensor]]:
        """By parts: positions in ``rows``, first layer's input ``[part, longest, width]``, the mask of its tokens."""
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
    """Numbers that each token has, where observations are such as of ``Tokens``, alone or beside a stage's."""
    if not isinstance(space, gym.spaces.Dict) or set(space) - {"stage"} != {"tokens", "mask"}:
        return None
    tokens, mask = space["tokens"].shape, space["mask"].shape
    return tokens[1] if tokens and len(tokens) == 2 and mask == tokens[:1] else None


def flat_size(space: gym.Space) -> int:
    """Numbers of an observation that are no tokens': all, where it is flat; of tokens, those of a stage beside them."""
    if isinstance(space, gym.spaces.Dict):
        return flat_size(space["stage"]) if "stage" in space.spaces else 0
    return int(np.prod(space.shape or ()))


def put(held: Any, at: Array, seen: Observations) -> None:
    """Write what is ``seen`` of some rows where that of all is ``held``, which has the same keys, if any."""
    if isinstance(seen, dict):
        for name, values in seen.items():
            held[name][at] = values
    else:
        held[at] = seen


def joined(parts: Sequence[Any]) -> Observations:
    """Observations of several batches as one; all are arrays, or dictionaries of the same keys."""
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


def spaces(core: Core) -> tuple[gym.Space, gym.Space]:
    """Observation and action space of one env, its own: it may be seeded."""
    return copy.deepcopy(core.observation_space), copy.deepcopy(core.actions.space)


def each(observations: Observations) -> list[Any]:
    """The observation of each instance of a batch."""
    if isinstance(observations, dict):
        return [dict(zip(observations, row, strict=True)) for row in zip(*observations.values(), strict=True)]
    return list(observations)


def reward_space(core: Core) -> gym.spaces.Box:
    """Bounds of the vector reward ``[quality, -flops_ratio]``."""
    highest = {"likelihood": 2.0, "balanced": np.inf}.get(core.config.quality.kind, 1.0)
    low, high = np.array([[0.0, -core.highest_flops_ratio], [highest, 0.0]], dtype=np.float32)
    return gym.spaces.Box(low, high, dtype=np.float32)
