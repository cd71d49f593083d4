"""Action spaces, the masks of a codebook, and which components of a decision each step of an episode makes."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.config import ConfigError, EnvConfig
from sd_gym.errors import short
from sd_gym.files import write_text
from sd_gym.registration import CONFIG_FOLDER


@dataclass(frozen=True, eq=False)
class Actions:
    """An action space, and how its actions become decisions."""

    space: gym.Space
    nvec: Array  # number of choices of each component of an action, int64
    meaning: str  # what an action is, in words, for error messages
    codebook: Array | None = None  # the decisions that actions choose by index, int64 ``[masks, switches + 1]``
    are_decisions: bool = True  # whether an action is a decision already

    def decisions(self, actions: Any, n: int) -> Array:
        """The decisions, int64 ``[n, switches + 1]``, of ``n`` actions, which are whole numbers of any type.

        Raises:
            ValueError: If the actions' shape, type or a value is wrong.
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
        choices = choices.astype(np.int64)
        if self.codebook is not None:
            return self.codebook[choices[:, 0]]
        return choices if self.are_decisions else np.pad(choices, ((0, 0), (0, 1)))  # bits have no token level


def decisions_as_actions(nvec: Array) -> Actions:
    """``MultiDiscrete``: a choice for each component of a decision, the token level last."""
    meaning = f"{len(nvec) - 1} switches, 1 = skip, and the token level"
    return Actions(gym.spaces.MultiDiscrete(nvec), nvec, meaning)


def indices_as_actions(masks: int, codebook: Array | None = None) -> Actions:
    """``Discrete``: the index of a mask of a codebook; without a codebook, of a table."""
    meaning = f"the index of one of {masks} masks"
    space = gym.spaces.Discrete(masks)
    return Actions(space, np.array([masks]), meaning, codebook=codebook, are_decisions=codebook is None)


def actions_of(config: EnvConfig, nvec: Array) -> Actions:
    """The actions of a configuration, for decisions whose components have these sizes.

    Raises:
        FileNotFoundError: If the codebook does not exist.
        ConfigError: If the config names no codebook where it needs one, or its masks do not fit.
    """
    if config.action == "multi_discrete":
        return decisions_as_actions(nvec)
    if config.action == "multi_binary":
        meaning = f"{len(nvec) - 1} switches, 1 = skip"
        return Actions(gym.spaces.MultiBinary(len(nvec) - 1), nvec[:-1], meaning, are_decisions=False)
    if config.codebook is None:
        raise ConfigError(
            f"{config.id}: action 'discrete' chooses from a codebook, but the config key 'codebook' is null; pass "
            "a JSON file with a list of masks, or the folder of a run: sd-gym train ENV --algo static"
        )
    try:
        codebook = read_masks(codebook_file(config.codebook), nvec)
    except ValueError as error:
        raise ConfigError(f"{config.id}: config key 'codebook': {error}") from error
    return indices_as_actions(len(codebook), codebook)


def as_array(actions: Any) -> Array:
    """Actions, which may be a tensor on any device, as a NumPy array; ``ValueError`` if they cannot be converted."""
    torch = sys.modules.get("torch")  # a caller with a tensor has imported it
    if torch is not None and isinstance(actions, torch.Tensor):
        actions = actions.detach().cpu()
        return (actions.float() if actions.is_floating_point() else actions).numpy()
    try:
        return np.asarray(actions)
    except Exception as error:  # such as lists of different lengths, or a broken __array__
        raise ValueError(f"actions must be an array of integers, got {short(actions)}") from error


def codebook_file(name: str) -> Path:
    """The file of a codebook: in the package, at a path, or in a run's folder; else ``FileNotFoundError``."""
    bundled, path = CONFIG_FOLDER / name, Path(name)
    file = bundled if bundled.is_file() else path / "codebook.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no codebook at {file}; expected a JSON file with a list of masks, or the folder of a run of static"
        )
    return file


def read_masks(file: Path, nvec: Array) -> Array:
    """The masks in a JSON file, int64 ``[masks, switches + 1]``; ``ValueError`` if they are malformed or do not fit."""
    try:
        masks = np.array(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a list of masks of one length: {error}") from error
    if masks.ndim != 2 or masks.dtype.kind != "i":
        raise ValueError(f"{file}: expected a list of masks, such as [[0, 0, 0], [1, 0, 0]]")
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
    """Write masks ``[masks, switches + 1]`` as JSON, one per line."""
    lines = ",\n".join(json.dumps(mask) for mask in np.asarray(masks).tolist())
    write_text(file, f"[\n{lines}\n]\n")


def all_decisions(nvec: Array) -> Array:
    """All decisions in lexicographic order, the dense one first: int64 ``[prod(nvec), components]``."""
    return np.array(list(product(*map(range, nvec))), dtype=np.int64)


def number_of_decisions(nvec: Array) -> int:
    """How many decisions there are."""
    return math.prod(int(size) for size in nvec)


class StageActions:
    """The actions of the stages: which components of a decision each stage decides, and their places in an action.

    All stages share one action space, that of the largest stage. Components that a stage lacks are ignored. A choice
    above a component's last one counts as its last one. ``masks`` forbids both.

    Args:
        components: For each stage, the components that it decides. Their places in an action are in this order.
        nvec: Sizes of a decision's components.
        level: The component of the token level, which has the last place in an action, if a stage decides it.

    Attributes:
        choices: Sizes of an action's components.
        masks: Which choices each stage has, bool ``[stages, sum(choices)]``.
        is_whole: Whether an action is the whole decision: one step makes all components, in order.
    """

    def __init__(self, components: Sequence[Array], nvec: Array, *, level: int = -1) -> None:
        self.components = list(components)
        self._nvec = nvec
        widest = max(int((own != level).sum()) for own in components)
        self._places = places = [np.where(own == level, widest, np.arange(len(own))) for own in components]
        self.is_whole = all(np.array_equal(own, np.arange(len(nvec))) for own in (*components, *places))
        sizes = np.ones((len(self.components), 1 + max(int(place.max(initial=0)) for place in places)), dtype=np.int64)
        for size, component, place in zip(sizes, components, places, strict=True):
            size[place] = nvec[component]
        self.choices = sizes.max(axis=0)
        has = [[np.arange(most) < own for most, own in zip(self.choices, size, strict=True)] for size in sizes]
        self.masks = np.stack([np.concatenate(allowed) for allowed in has])

    def to_decisions(self, stage: Array, choices: Array) -> Array:
        """Actions as decisions, int64 ``[n, components]``: zeros where the ``stage [n]`` of a row decides nothing."""
        if self.is_whole:
            return choices
        spread = np.zeros((len(choices), len(self._nvec)), dtype=np.int64)
        for number in np.unique(stage):
            at = np.flatnonzero(stage == number)[:, None]
            components = self.components[number]
            spread[at, components] = np.minimum(choices[at, self._places[number]], self._nvec[components] - 1)
        return spread

    def observed_to_decisions(self, observations: Any, choices: Array) -> Array:
        """``to_decisions`` with the stages read from observations."""
        return choices if self.is_whole else self.to_decisions(self.observed_stages(observations), choices)

    def observed_stages(self, observations: Any) -> Array:
        """The stages ``[n]`` of observations of several stages, which begin with the stage, one-hot."""
        flat = observations["stage"] if isinstance(observations, dict) else observations
        return flat[:, : len(self.components)].argmax(axis=1)

    def logit_indices(self) -> tuple[Array | None, int]:
        """Where an action's choices are among a decision's N logits, int64 ``[stages, sum(choices)]``; and N.

        ``None`` instead of the indices if an action is the whole decision. Two further indices stand for what a stage
        lacks: N for the only choice of a missing component (probability 1), N + 1 for a missing choice (probability 0).
        """
        ends = np.cumsum(self._nvec)
        certain, never = int(ends[-1]), int(ends[-1]) + 1
        own = np.split(np.arange(certain), ends[:-1])
        places_in_logits = []
        for components, places in zip(self.components, self._places, strict=True):
            rows = [np.array([certain] + [never] * (size - 1)) for size in self.choices.tolist()]
            for component, place in zip(components, places, strict=True):
                rows[place] = np.append(own[component], np.full(self.choices[place] - self._nvec[component], never))
            places_in_logits.append(np.concatenate(rows))
        return None if self.is_whole else np.array(places_in_logits, dtype=np.int64), certain
