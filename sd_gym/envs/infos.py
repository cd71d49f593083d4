"""What both shells take and tell: reset options, infos, rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_gym.config import EnvConfig
from sd_gym.envs.config import load_config
from sd_gym.envs.episodes import Episodes
from sd_gym.envs.protocols import Core, Outcome, Split
from sd_gym.envs.render import Shown, as_lines, scenes
from sd_gym.objectives import Objective
from sd_gym.registration import CONFIG_FOLDER

KNOWN_AT_RESET = ("instance", "difficulty")
_SCALARS = (np.float64, np.int64, np.bool_)


def check_shown(render_mode: str | None, info_text: bool, modes: Sequence[str]) -> None:
    """Raise ``ValueError`` for a mode that there is not; without any mode there are no texts either."""
    if not modes and (render_mode is not None or info_text):
        asked = "info_text" if render_mode is None else f"render_mode={render_mode!r}"
        raise ValueError(f"a table has outcomes and no texts, so there is nothing to show; leave out {asked}")
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode must be one of {', '.join(modes)} or None, got {render_mode!r}")


def checked_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a reset; ``None`` stands for none.

    Raises:
        TypeError: If they are not a dictionary.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"reset options: expected a dictionary such as {{'split': 'validation'}}, got {options!r}")
    return dict(options)


def chosen(core: Core, n: int, options: dict[str, Any] | None) -> tuple[Split, NDArray | None]:
    """The split that a reset with these options starts on, and the rows ``[n]``; ``None``: they are to be drawn.

    Args:
        core: The env's core.
        n: How many envs there are.
        options: ``{"split": name}`` and ``{"instance": id}`` (a list of ids for a vector env) choose what to decide on.

    Raises:
        TypeError: If the options are not a dictionary.
        ValueError: If an option or its value is unknown.
    """
    options = checked_options(options)
    unknown = set(options) - {"split", "instance"}
    if unknown:
        raise ValueError(f"unknown reset option {sorted(unknown)[0]!r}; expected 'split' or 'instance'")
    name = options.get("split", core.config.split)
    if name not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {name!r}; expected train, validation or test")
    split = core.split(name)
    if "instance" not in options:
        return split, None
    wanted = options["instance"]
    ids = [wanted] * n if isinstance(wanted, str) else list(wanted)
    if len(ids) != n:
        raise ValueError(f"expected {n} instance ids, one an env, got {len(ids)}")
    for identity in ids:
        if identity not in split.number_of:
            raise ValueError(f"no instance {identity!r} in the {name} split; ids run from {split.instances[0].id!r} on")
    return split, np.array([split.number_of[identity] for identity in ids])


def step_infos(core: Core, split: Split, rows: NDArray, decisions: NDArray, outcome: Outcome) -> dict[str, NDArray]:
    """The documented info of a step, one array of ``n`` values a key."""
    return {
        "quality": outcome.quality,
        "quality_ref": outcome.quality_ref,
        "cost": outcome.cost,
        "flops_ratio": outcome.flops_ratio,
        "vector_reward": np.stack([outcome.quality, -outcome.flops_ratio], axis=1),
        "is_success": outcome.cost == 0,
        "instance": split.ids[rows],
        "difficulty": split.difficulty[rows],
        "decision": core.to_masks(decisions),
    }


def reset_infos(core: Core, split: Split, rows: NDArray) -> dict[str, NDArray]:
    """The documented info of a reset: that of a step, with zeros for all that no decision has decided yet."""
    nothing = Outcome(*np.zeros((4, len(rows))))
    infos = step_infos(core, split, rows, np.zeros((len(rows), len(core.nvec)), dtype=np.int64), nothing)
    return {key: values if key in KNOWN_AT_RESET else np.zeros_like(values) for key, values in infos.items()}


def episode_infos(core: Core, split: Split, rows: NDArray, episodes: Episodes, envs: NDArray) -> dict[str, NDArray]:
    """The info of some envs that are not yet over: that of a reset, and what is decided so far."""
    infos = reset_infos(core, split, rows[envs]) | {"decision": core.to_masks(episodes.decisions[envs])}
    return infos | mask_infos(core, episodes, envs)


def mask_infos(core: Core, episodes: Episodes, envs: NDArray) -> dict[str, NDArray]:
    """Which choices some envs may make, int8 ``[n, choices]``, where an episode has several stages."""
    return {"action_mask": episodes.masks()[envs].astype(np.int8)} if core.is_staged else {}


def text_infos(split: Split, rows: NDArray, wanted: bool) -> dict[str, NDArray]:
    """The texts of instances, one array of ``n`` values a key, if they are ``wanted``: see ``SwitchableEnv``."""
    if not wanted:
        return {}
    instances = [split.instances[row] for row in rows]
    texts = {"source": [one.source for one in instances], "reference": [split.reference(row) for row in rows]}
    if split.paired:
        texts["source_pair"] = [one.source_pair for one in instances]
    return {key: objects(values) for key, values in texts.items()}


def info_of_one(infos: dict[str, NDArray]) -> dict[str, Any]:
    """The info of a single env: the first row of each array, numbers as Python's own."""
    return {key: values[0].item() if values[0].__class__ in _SCALARS else values[0] for key, values in infos.items()}


def no_rewards(config: EnvConfig, n: int) -> NDArray:
    """Zeros in the shape of ``n`` rewards."""
    return np.zeros((n, 2), dtype=np.float32) if config.reward.vector else np.zeros(n)


def rewards_of(config: EnvConfig, objective: Objective, outcome: Outcome) -> NDArray:
    """Rewards, float64 ``[n]``, by the objective; or float32 ``[n, 2]``: quality and minus the FLOPs ratio."""
    if config.reward.vector:
        return np.stack([outcome.quality, -outcome.flops_ratio], axis=1).astype(np.float32)
    return objective.rewards(outcome.quality, outcome.quality_ref, outcome.flops_ratio)


def decided(
    config: EnvConfig,
    core: Core,
    objective: Objective,
    split: Split,
    rows: NDArray,
    episodes: Episodes,
    envs: NDArray,
) -> tuple[dict[str, NDArray], NDArray]:
    """The step infos and the rewards of some envs that have just decided: all of them are over, or none is."""
    if not len(envs):
        return {}, no_rewards(config, 0)
    if not episodes.over[envs].all():
        infos = episode_infos(core, split, rows, episodes, envs)
        return infos, episodes.savings(split, rows, envs) if config.reward.dense else no_rewards(config, len(envs))
    outcome = episodes.outcome(split, rows, envs)
    rewards = rewards_of(config, objective, outcome)
    if config.reward.dense:
        rewards = rewards - episodes.paid[envs]
    infos = step_infos(core, split, rows[envs], episodes.decisions[envs], outcome)
    return infos | mask_infos(core, episodes, envs), rewards


def read_config(config_file: str, overrides: dict[str, Any]) -> EnvConfig:
    """The config of a file in ``envs_configs/``, or of any path, with overrides; raises as ``load_config``."""
    bundled = CONFIG_FOLDER / config_file
    return load_config(bundled if bundled.exists() else Path(config_file), overrides)


def pictures(core: Core, shown: Shown, render_mode: str) -> list[str] | list[NDArray]:
    """What each env shows: lines of text for ``ansi``, else pictures."""
    from sd_gym.envs.picture import as_image  # what draws is imported when something is drawn

    return [as_lines(scene) if render_mode == "ansi" else as_image(scene) for scene in scenes(core, shown)]


def objects(values: list[Any]) -> NDArray:
    """An array whose elements are these."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
