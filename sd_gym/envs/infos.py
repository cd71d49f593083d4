"""Shared helpers of the single and the vector envs: arguments, reset options, infos and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_gym.config import SPLITS, UnknownKeyError
from sd_gym.envs.protocols import Core, Split
from sd_gym.envs.render import Shown, as_lines, scenes


def check_render_mode(render_mode: str | None, modes: Sequence[str]) -> None:
    """Raise ``ValueError`` for an unknown render mode, or for any if there are no modes.

    The latter is a ``TypeError`` too, so that ``make_vec_env`` of Stable-Baselines3 tries again without ``rgb_array``.
    """
    if not modes and render_mode is not None:
        raise UnknownKeyError(
            f"a table has no texts, so there is nothing to show; leave out render_mode={render_mode!r}"
        )
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode must be one of {', '.join(modes)} or None, got {render_mode!r}")


def check_num_envs(num_envs: Any) -> None:
    """Raise ``ValueError`` unless ``num_envs`` is an integer of at least 1."""
    if isinstance(num_envs, bool) or not isinstance(num_envs, int | np.integer) or num_envs < 1:
        raise ValueError(f"num_envs: expected an integer of at least 1, got {num_envs!r}")


def checked_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a reset, empty for ``None``; raises ``TypeError`` if they are not a dictionary."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"reset options: expected a dictionary such as {{'split': 'validation'}}, got {options!r}")
    return dict(options)


def split_of(options: dict[str, Any] | None, default: str, others: Sequence[str] = ()) -> str:
    """The split that a reset with these options starts on; ``ValueError`` for an unknown split or option."""
    options, known = checked_options(options), ("split", *others)
    if unknown := sorted(set(options) - set(known), key=str):
        raise ValueError(f"unknown reset option {unknown[0]!r}; expected {' or '.join(map(repr, known))}")
    return checked_split(options.get("split", default))


def checked_split(name: Any) -> str:
    """The name of a split; ``ValueError`` if there is no such split."""
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}; expected train, validation or test")
    return name


def chosen_rows(core: Core, n: int, options: dict[str, Any] | None) -> tuple[Split, NDArray | None]:
    """The split that a reset with these options starts on, and its rows ``[n]``; ``None``: they are drawn.

    ``{"split": name}`` and ``{"instance": id}`` (a list of ids for a vector env) choose what to decide on. Raises
    ``TypeError`` if the options are not a dictionary or an id is no text, ``ValueError`` if an option or its value is
    unknown.
    """
    split = core.split(split_of(options, core.config.split, ["instance"]))
    if not options or "instance" not in options:
        return split, None
    wanted = options["instance"]
    ids = [wanted] * n if isinstance(wanted, str) else wanted
    if not isinstance(ids, Sequence | np.ndarray) or not all(isinstance(identity, str) for identity in ids):
        raise TypeError(f"reset option 'instance': expected an id, or a list with one per env, got {wanted!r}")
    if len(ids) != n:
        raise ValueError(f"expected {n} instance ids, one per env, got {len(ids)}")
    for identity in ids:
        if identity not in split.row_of:
            raise ValueError(f"no instance {identity!r} in the {split.name} split; its first id is {split.ids[0]!r}")
    return split, np.array([split.row_of[identity] for identity in ids])


def info_of_one(infos: dict[str, NDArray]) -> dict[str, Any]:
    """The info of a single env: the first row of each array, with Python numbers."""
    return {key: values[0].item() if isinstance(values[0], np.generic) else values[0] for key, values in infos.items()}


def infos_of_all(n: int, *parts: tuple[NDArray, dict[str, NDArray]]) -> dict[str, Any]:
    """Pairs of envs and infos in the format of ``VectorEnv``: a row per env, and a mask ``_key`` for each key."""
    merged: dict[str, NDArray] = {}
    for envs, infos in parts:
        for key, values in infos.items() if len(envs) else ():
            if key not in merged:
                merged[key] = np.full((n, *values.shape[1:]), None if values.dtype == object else 0, dtype=values.dtype)
                merged[f"_{key}"] = np.zeros(n, dtype=np.bool_)
            merged[key][envs] = values
            merged[f"_{key}"][envs] = True
    return merged


def final_infos(ended: NDArray, observations: Sequence[Any], infos: dict[str, NDArray]) -> dict[str, Any]:
    """The final observations and infos of a step that also resets, for the envs that ``ended``, bool ``[num_envs]``."""
    last = np.full(len(ended), None, dtype=object)
    last[:] = observations
    last[~ended] = None  # as in Gymnasium's own vector envs
    infos = infos_of_all(len(ended), (np.flatnonzero(ended), infos))
    return {"final_obs": last, "final_info": infos} | {f"_final_{name}": ended.copy() for name in ("obs", "info")}


def pictures(core: Core, shown: Shown, render_mode: str) -> list[Any]:
    """The picture of each env: lines of text for ``ansi``, else a uint8 array."""
    from sd_gym.envs.picture import as_image  # imported here, as most envs never draw

    return [as_lines(scene) if render_mode == "ansi" else as_image(scene) for scene in scenes(core, shown)]
