"""Models with a ``predict``, such as those of Stable-Baselines3, as policies of an evaluation."""

import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sd_gym.envs.protocols import Core
from sd_gym.envs.spaces import unbatched


def predicting(model: Any, core: Core) -> Callable[[Any], Any]:
    """From observations to choices by a model's ``predict``, as Stable-Baselines3 calls it in an episode.

    It is passed what the stage allows and, after the first stage, its own state, if it has parameters of these names
    (``MaskablePPO``, ``RecurrentPPO``). If its env is a ``VecNormalize``, observations are normalised as there.

    Raises:
        ValueError: If wrappers of Gymnasium change the observations of its env.
    """
    _check_unchanged(model)
    predict: Callable[..., Any] = model.predict
    normalizing = getattr(model, "get_vec_normalize_env", lambda: None)()
    try:
        takes = set(inspect.signature(predict).parameters)
    except (TypeError, ValueError):  # of a built-in function, for example
        takes = set[str]()
    state = None

    def act(observations: Any) -> Any:
        nonlocal state
        n = len(unbatched(observations))
        stages = core.stage_actions.observed_stages(observations) if core.is_staged else np.zeros(n, dtype=np.int64)
        more: dict[str, Any] = {"action_masks": core.action_masks[stages]} if "action_masks" in takes else {}
        if state is not None and {"state", "episode_start"} <= takes and stages.any():
            more |= {"state": state, "episode_start": np.zeros(n, dtype=np.bool_)}
        shown = observations if normalizing is None else normalizing.normalize_obs(observations)
        choices, state, *_ = predict(shown, deterministic=True, **more)
        return choices

    return act


def _check_unchanged(model: Any) -> None:
    """Raise ``ValueError`` if the model's env shows it other observations than an evaluation."""
    env = getattr(model, "get_env", lambda: None)()
    kinds: list[Any] = [gym.ObservationWrapper, gym.vector.VectorObservationWrapper]
    for kind in kinds:
        if isinstance(env, VecEnv) and any(env.env_is_wrapped(kind)):
            raise ValueError(
                f"the model learned on observations that a wrapper changed (a {kind.__name__}), and would be shown "
                "unchanged ones; normalise by VecNormalize, or pass a callable from observations to actions that "
                "changes them first: lambda observations: model.predict(change(observations), deterministic=True)[0]"
            )


def other_spaces(model: Any, core: Core) -> str:
    """In words, which spaces of a model of Stable-Baselines3 are not the env's; empty if none."""
    own = getattr(model, "observation_space", None), getattr(model, "action_space", None)
    of_env = core.observation_space, core.actions.space
    differ = [
        f"{space} (the env has {expected})"
        for space, expected in zip(own, of_env, strict=True)
        if isinstance(space, gym.Space) and space != expected
    ]
    remedy = "pass the settings of its env, such as action, observation or stages"
    return f". The model was trained on {' and '.join(differ)}; {remedy}" if differ else ""
