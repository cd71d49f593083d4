"""What an agent says and what it sees, by keyword: the spaces of the shells, and the way from them to the core."""

from __future__ import annotations

import copy
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.config import ConfigError, EnvConfig
from sd_gym.errors import short
from sd_gym.projection import OBSERVATION_LIMIT, deviation_of
from sd_gym.registration import CONFIG_FOLDER

if TYPE_CHECKING:  # an env of a table needs no torch
    from torch import Tensor

    from sd_gym.envs.protocols import Core, Split

Array = NDArray
Observations = Array | dict[str, Array]  # of a batch: one row an instance


class Actions(ABC):
    """How an agent says its decisions.

    Attributes:
        space: Of one action.
        nvec: How many choices each component of an action has, int64; a mask of choices has their sum.
        meaning: What an action holds, for messages.
    """

    def __init__(self, space: gym.Space, nvec: Array, meaning: str) -> None:
        self.space = space
        self.nvec = np.array(nvec, dtype=np.int64)
        self.meaning = meaning

    def decisions(self, actions: Any, n: int) -> Array:
        """The decisions, int64 ``[n, switches + 1]``, that ``n`` actions, whole numbers of any type, stand for.

        Raises:
            ValueError: If the actions' shape, type or a value is wrong.
        """
        array, shape = as_array(actions), (n, *self.space.shape)
        if array.shape != shape:
            raise ValueError(
                f"expected actions of shape {shape} ({self.meaning}, for each of {n} instances), got {array.shape}"
            )
        if array.dtype.kind not in "biuf":
            raise ValueError(f"actions must be integers ({self.meaning}), got {array.dtype}")
        broken = array != np.floor(array)
        if broken.any():
            raise ValueError(f"actions must be integers ({self.meaning}), got {array[broken][0]}")
        choices = array.reshape(n, len(self.nvec))
        wrong = (choices < 0) | (choices >= self.nvec)
        if wrong.any():
            component = int(wrong.any(axis=0).argmax())
            raise ValueError(
                f"action component {component} must be in 0..{self.nvec[component] - 1}, got "
                f"{choices[wrong[:, component], component][0]}"
            )
        return self._decided(array.astype(np.int64))

    @abstractmethod
    def _decided(self, actions: Array) -> Array:
        """The decisions of actions that were checked."""


class MultiDiscreteActions(Actions):
    """The decision as it is: a choice for each switch (1 = skip), the last one for the tokens."""

    def __init__(self, config: EnvConfig, nvec: Array) -> None:
        meaning = f"{len(nvec) - 1} switches, 1 = skip, and the token level"
        super().__init__(gym.spaces.MultiDiscrete(nvec), nvec, meaning)

    def _decided(self, actions: Array) -> Array:
        return actions


class MultiBinaryActions(Actions):
    """A bit for each switch (1 = skip), where there is nothing to choose about the tokens."""

    def __init__(self, config: EnvConfig, nvec: Array) -> None:
        super().__init__(gym.spaces.MultiBinary(len(nvec) - 1), nvec[:-1], f"{len(nvec) - 1} switches, 1 = skip")

    def _decided(self, actions: Array) -> Array:
        return np.pad(actions, ((0, 0), (0, 1)))


class DiscreteActions(Actions):
    """The number of a mask in the config's codebook.

    Attributes:
        codebook: The masks, int64 ``[masks, switches + 1]``.

    Raises:
        FileNotFoundError: If there is no such codebook.
        ConfigError: If none is named, or its masks are none of this backbone.
    """

    def __init__(self, config: EnvConfig, nvec: Array) -> None:
        if config.codebook is None:
            raise ConfigError(
                f"{config.id}: action 'discrete' chooses from a codebook, but the config key 'codebook' is null; pass "
                "a JSON file with a list of masks, or the folder of a run: sd-gym train ENV --algo static"
            )
        try:
            self.codebook = read_masks(codebook_file(config.codebook), nvec)
        except ValueError as error:
            raise ConfigError(f"{config.id}: config key 'codebook': {error}") from error
        masks = len(self.codebook)
        super().__init__(gym.spaces.Discrete(masks), [masks], f"the number of one of {masks} masks")

    def _decided(self, actions: Array) -> Array:
        return self.codebook[actions]


def as_array(actions: Any) -> Array:
    """Actions as a NumPy array: of a tensor on any device too, whether or not it has a gradient.

    Raises:
        ValueError: If they are no array.
    """
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    if torch is not None and isinstance(actions, torch.Tensor):
        actions = actions.detach().cpu()
        return (actions.float() if actions.is_floating_point() else actions).numpy()
    try:
        return np.asarray(actions)
    except Exception as error:  # of lists of different lengths, of objects that say they were arrays
        raise ValueError(f"actions must be an array of integers, got {short(actions)}") from error


ACTIONS = {"multi_discrete": MultiDiscreteActions, "multi_binary": MultiBinaryActions, "discrete": DiscreteActions}


def codebook_file(name: str) -> Path:
    """The file of a codebook: of the package, a path, or in the folder of a run.

    Raises:
        FileNotFoundError: If there is none.
    """
    bundled, path = CONFIG_FOLDER / name, Path(name)
    file = bundled if bundled.is_file() else path / "codebook.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no codebook at {file}; expected a JSON file with a list of masks, or the folder of a run of static"
        )
    return file


def read_masks(file: Path, nvec: Array) -> Array:
    """Masks of a JSON file, int64 ``[masks, switches + 1]``.

    Raises:
        ValueError: If they are no masks, or those of something else.
    """
    try:
        masks = np.array(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file} is no list of masks of one length: {error}") from error
    if masks.ndim != 2 or masks.dtype.kind != "i":
        raise ValueError(f"{file} is no list of masks, such as [[0, 0, 0], [1, 0, 0]]")
    if masks.shape[1] != len(nvec):
        raise ValueError(
            f"the masks in {file} have {masks.shape[1]} components, expected {len(nvec)}: one for each of "
            f"{len(nvec) - 1} switches, and the token level"
        )
    if (masks < 0).any() or (masks >= nvec).any():
        raise ValueError(
            f"the masks in {file} have components from {masks.min()} to {masks.max()}; expected 0 or 1 for a switch, "
            f"and a token level below {nvec[-1]}"
        )
    return masks


def write_masks(masks: Array, file: Path) -> None:
    """Write masks ``[masks, switches + 1]`` as JSON, one a line."""
    lines = ",\n".join(json.dumps(mask) for mask in np.asarray(masks).tolist())
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


class Observation(ABC):
    """What an agent sees of an instance before it decides; ``sd_gym.register_observation`` gives a class a name.

    It is made once a core, as ``Observation(core)``; what it needs to standardise comes from ``core.split("train")``.

    Attributes:
        space: Of one observation: a ``Box``, or a ``Dict`` of simple spaces.
    """

    space: gym.Space

    @abstractmethod
    def observe(self, split: Split, rows: Array) -> Observations:
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

    def __init__(self, core: Core) -> None:
        from sd_gym.tasks.ranking import STATISTICS_SIZE

        split = core.split("train")
        features = self._features(split, np.arange(min(len(split), STATISTICS_SIZE)))
        self.mean = features.mean(axis=0)
        self.deviation = deviation_of(features.std(axis=0))
        self.space = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, self.mean.shape, np.float32)

    @abstractmethod
    def features(self, split: Split, rows: Array) -> Array:
        """Numbers ``[n, features]`` of the instances ``rows [n]``."""

    def observe(self, split: Split, rows: Array) -> Array:
        """Standardised features, float32 ``[n, features]``, each within ``OBSERVATION_LIMIT``."""
        return self.standardised(self._features(split, rows))

    def standardised(self, features: Array) -> Array:
        """Features ``[n, features]`` by the training split's mean and deviation."""
        return np.clip((features - self.mean) / self.deviation, -OBSERVATION_LIMIT, OBSERVATION_LIMIT)

    def _features(self, split: Split, rows: Array) -> Array:
        return np.asarray(self.features(split, rows), dtype=np.float32)


class Pooled(Standardised):
    """Mean and maximum over tokens of the first layer's input, the length and its logarithm."""

    def features(self, split: Split, rows: Array) -> Array:
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

    def __init__(self, core: Core) -> None:
        from sd_gym.tasks.ranking import STATISTICS_SIZE

        self.length = core.config.backbone.max_source_length
        split = core.split("train")
        count, total, squares = 0, 0.0, 0.0
        for _, hidden, mask in self._embedded(split, np.arange(min(len(split), STATISTICS_SIZE))):
            kept = hidden[mask.bool()].cpu().numpy().astype(np.float64)
            count, total, squares = count + len(kept), total + kept.sum(axis=0), squares + (kept**2).sum(axis=0)
        mean = total / count
        self.mean = mean.astype(np.float32)
        self.deviation = deviation_of(np.sqrt(np.maximum(squares / count - mean**2, 0)))
        limits = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, (self.length, len(mean)), np.float32)
        self.space = gym.spaces.Dict({"tokens": limits, "mask": gym.spaces.MultiBinary(self.length)})

    def observe(self, split: Split, rows: Array) -> dict[str, Array]:
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

    def _embedded(self, split: Split, rows: Array) -> Iterator[tuple[Array, Tensor, Tensor]]:
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
    return tokens[1] if len(tokens) == 2 and mask == tokens[:1] else None


def flat_size(space: gym.Space) -> int:
    """Numbers of an observation that are no tokens': all, where it is flat; of tokens, those of a stage beside them."""
    if isinstance(space, gym.spaces.Dict):
        return flat_size(space["stage"]) if "stage" in space.spaces else 0
    return int(np.prod(space.shape))


def put(held: Observations, at: Array, seen: Observations) -> None:
    """Write what is ``seen`` of some rows where that of all is ``held``."""
    if isinstance(held, dict):
        for name, values in seen.items():
            held[name][at] = values
    else:
        held[at] = seen


def joined(parts: Sequence[Observations]) -> Observations:
    """Observations of several batches as one."""
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
