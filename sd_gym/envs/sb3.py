"""The core as a Stable-Baselines3 ``VecEnv``; the only room under ``sd_gym`` that imports that library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sd_gym.envs.shells import SwitchableVectorEnv


class SwitchableVecEnv(VecEnv):
    """A ``SwitchableVectorEnv`` as Stable-Baselines3 wants it: list infos, copied ``terminal_observation``.

    Args:
        env: The vector env to present.
    """

    def __init__(self, env: SwitchableVectorEnv) -> None:
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions: NDArray | None = None

    def reset(self) -> NDArray:
        """Observations ``[num_envs, features]`` of new instances; takes the seed and options set before."""
        options = self._options[0] or None
        observations, infos = self.env.reset(seed=self._seeds[0], options=options)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = self._listed(infos)
        return observations

    def step_async(self, actions: NDArray) -> None:
        """Take the actions ``[num_envs, switches + 1]`` for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> tuple[NDArray, NDArray, NDArray, list[dict[str, Any]]]:
        """(observations, rewards, dones, infos) of the step; the observations are those of the next instances."""
        observations, rewards, dones, _, infos = self.env.step(self._actions)
        listed = self._listed(infos["final_info"])
        for info, final in zip(listed, infos["final_obs"], strict=True):
            info["TimeLimit.truncated"] = False
            info["terminal_observation"] = np.copy(final)
        self.reset_infos = self._listed(infos)
        return observations, rewards.astype(np.float32), dones, listed

    def close(self) -> None:
        """Nothing is held."""
        self.env.close()

    def get_images(self) -> Sequence[NDArray | None]:
        """One picture an env if the render mode is ``rgb_array``."""
        return self.env.render() if self.render_mode == "rgb_array" else [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the vector env, once for each index."""
        return [getattr(self.env, attr_name)] * len(self._get_indices_list(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector env; it is shared, so ``indices`` must be ``None``."""
        if indices is not None:
            raise ValueError("the envs of a SwitchableVecEnv share their attributes; indices must be None")
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method; ``action_masks`` gives one mask an env, every choice allowed."""
        n = len(self._get_indices_list(indices))
        if method_name == "action_masks":
            return [np.ones(int(self.env.core.nvec.sum()), dtype=bool) for _ in range(n)]
        return [getattr(self.env, method_name)(*args, **kwargs)] * n

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """No env is wrapped."""
        return [False] * len(self._get_indices_list(indices))

    def _get_indices_list(self, indices: Any) -> list[int]:
        return list(self._get_indices(indices))

    def _listed(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """Infos as SB3 wants them: a dictionary an env."""
        keys = [key for key in infos if not key.startswith(("_", "final"))]
        columns = [infos[key].tolist() if infos[key].ndim == 1 else list(infos[key]) for key in keys]
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
