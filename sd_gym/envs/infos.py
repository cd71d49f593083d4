"""Shared helpers of the single and the vector env: config files, reset options, infos and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_gym.config import EnvConfig, UnknownKeyError
from sd_gym.envs.config import load_config
from sd_gym.envs.protocols import Core, Split
from sd_gym.envs.render import Shown, as_lines, scenes
from sd_gym.registration import CONFIG_FOLDER

_SCALARS = (np.float64, np.int64, np.bool_)


def check_shown(render_mode: str | None, modes: Sequence[str]) -> None:
    """Raise ``ValueError`` for an unknown render mode, or for any where there are no modes.

    The latter is a ``TypeError`` too: then ``make_vec_env`` of Stable-Baselines3 tries again without ``rgb_array``.
    """
    if not modes and render_mode is not None:
        raise UnknownKeyError(
            f"a table has no texts, so there is nothing to show; leave out render_mode={render_mode!r}"
        )
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode must be one of {', '.join(modes)} or None, got {render_mode!r}")


def checked_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a reset, empty for ``None``; raises ``TypeError`` if they are not a dictionary."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"reset options: expected a dictionary such as {{'split': 'validation'}}, got {options!r}")
    return dict(options)


def chosen(core: Core, n: int, options: dict[str, Any] | None) -> tuple[Split, NDArray | None]:
    """The split that a reset with these options starts on, and its rows ``[n]``; ``None``: they are drawn.

    ``{"split": name}`` and ``{"instance": id}`` (a list of ids for a vector env) choose what to decide on. Raises
    ``TypeError`` if the options are not a dictionary or an id is no text, ``ValueError`` if an option or its value is
    unknown.
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
    ids = [wanted] * n if isinstance(wanted, str) else wanted
    if not isinstance(ids, Sequence | np.ndarray) or not all(isinstance(identity, str) for identity in ids):
        raise TypeError(f"reset option 'instance': expected an id, or a list with one per env, got {wanted!r}")
    if len(ids) != n:
        raise ValueError(f"expected {n} instance ids, one per env, got {len(ids)}")
    for identity in ids:
        if identity not in split.number_of:
            raise ValueError(f"no instance {identity!r} in the {name} split; its first id is {split.ids[0]!r}")
    return split, np.array([split.number_of[identity] for identity in ids])


def info_of_one(infos: dict[str, NDArray]) -> dict[str, Any]:
    """The info of a single env: the first row of each array, with Python numbers."""
    return {key: values[0].item() if values[0].__class__ in _SCALARS else values[0] for key, values in infos.items()}


def read_config(config_file: str, overrides: dict[str, Any]) -> EnvConfig:
    """The config of a file in ``envs_configs/``, or of any path, with overrides; raises as ``load_config``."""
    bundled = CONFIG_FOLDER / config_file
    return load_config(bundled if bundled.exists() else Path(config_file), overrides)


def pictures(core: Core, shown: Shown, render_mode: str) -> list[Any]:
    """What each env shows: lines of text for ``ansi``, else arrays."""
    from sd_gym.envs.picture import as_image  # imported here, as most envs never draw

    return [as_lines(scene) if render_mode == "ansi" else as_image(scene) for scene in scenes(core, shown)]
