"""The core as a Stable-Baselines3 ``VecEnv``; of the other modules only those of agents import that library."""

import copy
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sd_gym.envs.spaces import Observations, unbatched

ROW_PER_ENV = ("action_masks", "render")  # methods of the vector env that return a row per env


class SwitchableVecEnv(VecEnv):
    """A ``SwitchableVectorEnv`` as Stable-Baselines3 expects it: list infos with a ``terminal_observation``.

    Gymnasium's vector wrappers may be around it; spaces, observations, rewards and infos are then theirs. Wrappers that
    refuse ``AutoresetMode.SAME_STEP`` need an env of another mode; this class still resets in the same step, as
    Stable-Baselines3 expects. The info of an episode's last step has ``episode`` (return ``r``, length ``l``, seconds
    ``t``), as ``VecMonitor`` gives it, so it needs no ``VecMonitor`` around it.

    Raises:
        ValueError: If its reward is a vector.
    """

    def __init__(self, env: VectorEnv) -> None:
        if hasattr(env.unwrapped, "reward_space"):
            raise ValueError("Stable-Baselines3 learns from one number, but the env has reward.vector=True")
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions: NDArray | None = None
        self._everywhere = np.ones(env.num_envs, dtype=np.bool_)
        self._started = time.monotonic()
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, dtype=np.int64)

    def reset(self) -> Observations:
        """Observations of new instances, by the seed and options set before.

        Raises:
            ValueError: If ``set_options`` got options per env that differ in more than the ``instance``.
        """
        observations, infos = self.env.reset(seed=self._seeds[0], options=_joined(self._options))
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = self._listed(infos)
        self._returns[:], self._lengths[:] = 0, 0
        return observations

    def step_async(self, actions: NDArray) -> None:
        """Take the actions, one row per env, for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> tuple[Observations, NDArray, NDArray, list[dict[str, Any]]]:
        """(observations, rewards, dones, infos) of the step; the observations are those of the next instances."""
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        dones = terminated | truncated
        if self.env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP:
            finals, reset = infos.pop("final_obs", [None] * self.num_envs), self._listed(infos)
            listed = [_step_info(info) for info in reset]
        else:
            finals, listed = unbatched(observations), self._listed(infos)
            reset = [info.copy() for info in listed]  # without the keys that are added below
            if dones.any():
                if not dones.all():  # resetting some would step the others
                    raise ValueError("episodes end at different steps; make the env with autoreset_mode=SAME_STEP")
                finals = unbatched(copy.deepcopy(observations))  # a wrapper may reuse its arrays
                if self.env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
                    observations, *_, infos = self.env.step(self._actions)
                else:
                    observations, infos = self.env.reset(options={"reset_mask": dones})
                reset = self._listed(infos)
        for info, final, done, cut in zip(listed, finals, dones, truncated & ~terminated, strict=True):
            info["TimeLimit.truncated"] = bool(cut)
            if done:
                info["terminal_observation"] = final
        self._count(rewards, dones, listed)
        self.reset_infos = reset
        return observations, rewards.astype(np.float32), dones, listed

    def close(self) -> None:
        """Close the vector env."""
        self.env.close()

    def get_images(self) -> Any:
        """One picture per env if the render mode is ``rgb_array``, else ``None`` per env."""
        return self.env.render() if self.render_mode == "rgb_array" else [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the outermost wrapper or vector env that has it, for each index; else ``AttributeError``."""
        return [getattr(self._holder(attr_name), attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute where ``get_attr`` finds it; a new attribute, on the vector env.

        Raises:
            ValueError: If ``indices`` leaves out some envs, since they share their attributes.
        """
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise ValueError("the envs of a SwitchableVecEnv share their attributes; indices must be None, or all")
        holder = self._holder(attr_name) if self.has_attr(attr_name) else self.env.unwrapped
        setattr(holder, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the vector env or a wrapper once; its result per index, or its row if in ``ROW_PER_ENV``."""
        result = getattr(self._holder(method_name), method_name)(*args, **kwargs)
        return [result[env] if method_name in ROW_PER_ENV else result for env in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Whether the vector env is wrapped in this class, for each index."""
        wrapped = any(isinstance(env, wrapper_class) for env in self._layers())
        return [wrapped] * len(list(self._get_indices(indices)))

    def _count(self, rewards: NDArray, dones: NDArray, infos: list[dict[str, Any]]) -> None:
        """Add a step to the episodes, and write return and length of those that end into ``infos``."""
        self._returns += rewards
        self._lengths += 1
        seconds = round(time.monotonic() - self._started, 6)
        for env in np.flatnonzero(dones):
            episode = {"r": float(self._returns[env]), "l": int(self._lengths[env]), "t": seconds}
            infos[env].setdefault("episode", episode)  # a wrapper may have counted
        self._returns[dones], self._lengths[dones] = 0, 0

    def _layers(self) -> Iterator[VectorEnv]:
        env: Any = self.env
        while env is not env.unwrapped:
            yield env
            env = env.env
        yield env

    def _holder(self, name: str) -> VectorEnv:
        for env in self._layers():
            if hasattr(env, name):
                return env
        raise AttributeError(f"{self.env} has no attribute {name!r}")

    def _listed(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """Infos as SB3 expects them: a dictionary per env, with the keys that the env has."""
        columns = {key: self._column(values) for key, values in infos.items() if not key.startswith("_")}
        listed = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for key in columns:
            for env in np.flatnonzero(~infos.get(f"_{key}", self._everywhere)):
                del listed[env][key]
        return listed

    def _column(self, values: NDArray | dict[str, Any]) -> list[Any]:
        if isinstance(values, dict):
            return self._listed(values)
        return values.tolist() if values.ndim == 1 else list(values)


def _joined(options: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The options of each env as those of the vector env, which has one split and an instance per env."""
    first = options[0]
    if all(own == first for own in options):
        return first or None
    shared = [{key: value for key, value in own.items() if key != "instance"} for own in options]
    if any(own != shared[0] for own in shared) or not all("instance" in own for own in options):
        raise ValueError(f"expected the same options for all envs, or an 'instance' for each; got {options}")
    return shared[0] | {"instance": [own["instance"] for own in options]}


def _step_info(info: dict[str, Any]) -> dict[str, Any]:
    """Move the step's info, with the keys that wrappers added, out of the info of a ``SAME_STEP`` reset."""
    final = info.pop("final_info", None)
    if final is None:
        return dict(info)
    added = [key for key in info if key not in final]
    return final | {key: info.pop(key) for key in added}
