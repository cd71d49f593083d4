"""How agents say their decisions: action spaces, the masks of a codebook, and what each step of an episode decides."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sd_gym.config import ConfigError, EnvConfig
from sd_gym.errors import short
from sd_gym.registration import CONFIG_FOLDER

Array = NDArray


class Actions(ABC):
    """How an agent says its decisions; ``nvec``: how many choices each component of an action has, int64."""

    are_decisions: ClassVar[bool] = False  # whether the core takes an action as it is

    def __init__(self, space: gym.Space, nvec: ArrayLike, meaning: str) -> None:
        self.space, self.meaning = space, meaning
        self.nvec = np.array(nvec, dtype=np.int64)

    def decisions(self, actions: Any, n: int) -> Array:
        """The decisions, int64 ``[n, switches + 1]``, that ``n`` actions, whole numbers of any type, stand for.

        Raises ``ValueError`` if the actions' shape, type or a value is wrong.
        """
        array, shape = as_array(actions), (n, *(self.space.shape or ()))
        if array.shape != shape:
            raise ValueError(
                f"expected actions of shape {shape} ({self.meaning}, for each of {n} instances), got {array.shape}"
            )
        if array.dtype.kind not in "biuf":
            raise ValueError(f"actions must be integers ({self.meaning}), got {array.dtype}")
        if array.dtype.kind == "f" and (broken := array != np.floor(array)).any():
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

    are_decisions = True

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

    Raises ``FileNotFoundError`` if there is no such codebook, ``ConfigError`` if none is named or its masks do not fit.
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


class MaskActions(Actions):
    """The number of one of the masks of a table, ``Discrete``."""

    are_decisions = True

    def __init__(self, masks: int) -> None:
        super().__init__(gym.spaces.Discrete(masks), [masks], f"the number of one of {masks} masks")

    def _decided(self, actions: Array) -> Array:
        return actions[:, None]


def as_array(actions: Any) -> Array:
    """Actions, which may be a tensor on any device, as a NumPy array; raises ``ValueError`` if they are no array."""
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
    """The file of a codebook: of the package, a path, or in a run's folder; raises ``FileNotFoundError`` for none."""
    bundled, path = CONFIG_FOLDER / name, Path(name)
    file = bundled if bundled.is_file() else path / "codebook.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no codebook at {file}; expected a JSON file with a list of masks, or the folder of a run of static"
        )
    return file


def read_masks(file: Path, nvec: Array) -> Array:
    """Masks of a JSON file, int64 ``[masks, switches + 1]``; raises ``ValueError`` if they are none, or do not fit."""
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


def all_decisions(nvec: Array) -> Array:
    """All there are, in the order of their numbers, the dense one first: int64 ``[prod(nvec), components]``."""
    return np.array(list(product(*map(range, nvec))), dtype=np.int64)


def number_of_decisions(nvec: Array) -> int:
    """How many there are."""
    return math.prod(int(size) for size in nvec)


class Steps:
    """Which components of a decision each step of an episode makes, and where in an action they stand.

    All steps have the same action space, that of the largest. Where a step has fewer components the rest is passed
    over, and of fewer choices the last one is taken; both are masked.
    ``components`` are for each stage those that it decides, ``places`` where in an action they stand; ``choices`` are
    sizes of an action's components, ``masks`` which of them each stage has, bool ``[stages, sum(choices)]``.
    ``is_whole``: whether an action is the whole decision, as one step makes all components, in their order.
    ``answers``: whether the last step is that of the stage ``answer``.
    """

    def __init__(
        self, components: Sequence[Array], places: Sequence[Array], nvec: Array, *, answers: bool = False
    ) -> None:
        self.components, self._places, self._nvec, self._answers = list(components), list(places), nvec, answers
        self.is_whole = all(np.array_equal(own, np.arange(len(nvec))) for own in (*components, *places))
        sizes = np.ones((len(self.components), 1 + max(int(place.max(initial=0)) for place in places)), dtype=np.int64)
        for size, component, place in zip(sizes, components, places, strict=True):
            size[place] = nvec[component]
        self.choices = sizes.max(axis=0)
        has = [[np.arange(most) < own for most, own in zip(self.choices, size, strict=True)] for size in sizes]
        self.masks = np.stack([np.concatenate(allowed) for allowed in has])

    def take(self, stage: int, decisions: Array, choices: Array) -> None:
        """Write what a stage decides, of ``choices``, into ``decisions``; both ``[n, components of a decision]``."""
        components = self.components[stage]
        decisions[:, components] = choices[:, components]

    def spread(self, stage: Array, choices: Array) -> Array:
        """What actions say at the components that their stages decide, int64 ``[n, components]``; zeros elsewhere."""
        if self.is_whole:
            return choices
        spread = np.zeros((len(choices), len(self._nvec)), dtype=np.int64)
        for number in np.unique(stage):
            at = np.flatnonzero(stage == number)[:, None]
            components = self.components[number]
            spread[at, components] = np.minimum(choices[at, self._places[number]], self._nvec[components] - 1)
        return spread

    def spread_seen(self, observations: Any, choices: Array) -> Array:
        """The same, of actions on observations; of several stages these begin with the stage, one-hot."""
        if self.is_whole:
            return choices
        shown = observations["stage"] if isinstance(observations, dict) else observations
        return self.spread(shown[:, : len(self.components)].argmax(axis=1), choices)

    def ends(self, stage: int) -> Array:
        """A decision, int64 ``[components]``, that skips as much as can be after a stage, and nothing before.

        The answer is accepted.
        """
        ends = np.zeros(len(self._nvec), dtype=np.int64)
        for components in self.components[stage + 1 : len(self.components) - self._answers]:
            ends[components] = self._nvec[components] - 1
        return ends

    def of_logits(self) -> tuple[Array | None, int]:
        """Where in a decision's logits an action's choices stand at each stage, int64 ``[stages, sum(choices)]``.

        ``None`` if an action is the whole decision. And how many logits a decision has, ``N``: ``N`` stands for a
        choice that is certain, since the stage has not this component, and ``N + 1`` for one that is never made.
        """
        ends = np.cumsum(self._nvec)
        certain, never = int(ends[-1]), int(ends[-1]) + 1
        own = np.split(np.arange(certain), ends[:-1])
        found = []
        for components, places in zip(self.components, self._places, strict=True):
            rows = [np.array([certain] + [never] * (size - 1)) for size in self.choices.tolist()]
            for component, place in zip(components, places, strict=True):
                rows[place] = np.append(own[component], np.full(self.choices[place] - self._nvec[component], never))
            found.append(np.concatenate(rows))
        return None if self.is_whole else np.array(found, dtype=np.int64), certain
