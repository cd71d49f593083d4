"""The core as a ``gymnasium.vector.VectorEnv``."""

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from sd_gym.envs.config import load_config
from sd_gym.envs.episodes import Episodes
from sd_gym.envs.infos import (
    check_num_envs,
    check_render_mode,
    checked_options,
    chosen_rows,
    final_infos,
    infos_of_all,
    pictures,
)
from sd_gym.envs.protocols import Observations
from sd_gym.envs.render import Shown
from sd_gym.envs.shared import shared_core
from sd_gym.envs.single import METADATA
from sd_gym.envs.spaces import reward_space, spaces, unbatched


class SwitchableVectorEnv(VectorEnv):
    """A batch of ``SwitchableEnv``: each step runs the backbone once, on all ``num_envs`` instances.

    Description:
        All episodes have as many steps as there are stages, so they end together, except after a masked reset. What
        follows is Gymnasium's ``AutoresetMode``, as in ``SyncVectorEnv``:

        * ``SAME_STEP`` (default): the step also resets. Observations and infos are those of the next instances.
          ``infos["final_info"]`` has the info of the step, ``infos["final_obs"]`` the observations decided on.
        * ``NEXT_STEP``: observations and infos are those of the step. The next step ignores its actions and resets.
        * ``DISABLED``: ``reset(options={"reset_mask": mask})`` resets the masked envs. Steps before it are refused.

    Action Space:
        Batched from ``single_action_space``, the space of ``SwitchableEnv``.

    Observation Space:
        Batched from ``single_observation_space``, the space of ``SwitchableEnv``.

    Reward:
        As in ``SwitchableEnv``, ``[num_envs]``; with ``vector_reward=True`` ``[num_envs, 2]``.

    Episode End:
        As in ``SwitchableEnv``; no episode is truncated.

    Info:
        Arrays of the values of ``SwitchableEnv``.

    Arguments:
        config_file: As in ``SwitchableEnv``.
        num_envs: Batch size, at least 1.
        render_mode: As in ``SwitchableEnv`` without ``human``; one picture per env.
        autoreset_mode: An ``AutoresetMode`` or its value, as in ``gym.make_vec(id, autoreset_mode="NextStep")``.
        overrides: Any key of the config.

    Version History:
        * v0: first version.

    Raises:
        ValueError: If the autoreset mode is unknown, or loses episodes in RLlib, or ``num_envs`` is below 1. Other
            errors are those of ``SwitchableEnv``.
    """

    metadata = METADATA | {"autoreset_mode": AutoresetMode.SAME_STEP}
    _np_random: Any  # a generator, or a tuple of one for each env
    _np_random_seed: Any

    def __init__(
        self,
        config_file: str,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        **overrides: Any,
    ) -> None:
        check_num_envs(num_envs)
        check_render_mode(render_mode, type(self).metadata["render_modes"])
        self.autoreset_mode = _checked_mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.config = load_config(config_file, overrides)
        self.core = shared_core(self.config)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space, self.single_action_space = spaces(self.core)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        if self.config.reward.vector:
            self.reward_space = reward_space(self.core)  # of one env, as MO-Gymnasium's vector envs have it
        self._episodes = Episodes(self.core, num_envs)
        self.objective = self._episodes.objective
        self._shown: Shown | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Draw an instance for each env.

        Args:
            seed: A number seeds one generator, from which the instances of all envs are drawn. A list, with one seed
                per env, gives each env its own generator, which draws like a single env with this seed; ``None`` in it
                leaves an env's generator as it is.
            options: As for ``SwitchableEnv``; ``instance`` may be a list of ids, one per env. ``reset_mask``, bool
                ``[num_envs]``, selects the envs to reset; the others keep their instances, and are not in the infos.
                All envs are on one split, which only a reset of all of them changes.

        Raises:
            ValueError: If a seed or an option is wrong.
            TypeError: If ``options`` is not a dictionary, or ``reset_mask`` not an array of booleans.
            gymnasium.error.ResetNeeded: If the first reset is not one of all envs.
        """
        options = checked_options(options)
        envs = self._envs_to_reset(options)
        self._seed(seed, envs)
        episodes = self._episodes
        episodes.split, rows = chosen_rows(self.core, self.num_envs, options)
        episodes.begin(envs, self._random_rows(envs) if rows is None else rows[envs])
        self._show(episodes.over)
        return episodes.observe(), infos_of_all(self.num_envs, (envs, episodes.infos(envs)))

    def step(self, actions: Any) -> tuple[Observations, NDArray, NDArray, NDArray, dict[str, Any]]:
        """Run the backbone under the decisions of a batch of actions, then autoreset as the class describes.

        Raises:
            ValueError: If the actions are malformed.
            gymnasium.error.ResetNeeded: If an env has to be reset first.
        """
        episodes, n = self._episodes, self.num_envs
        if not episodes.is_begun:
            raise gym.error.ResetNeeded("call reset() before the first step()")
        over = episodes.over
        if self.autoreset_mode == AutoresetMode.DISABLED and over.any():
            raise gym.error.ResetNeeded(
                f"the episodes of envs {np.flatnonzero(over).tolist()} are over and autoreset is disabled: call "
                'reset(options={"reset_mask": terminated}) before the next step()'
            )
        choices = self.core.actions.decisions(actions, n)
        acting = np.flatnonzero(~over)
        resetting = np.flatnonzero(over)  # in NEXT_STEP; empty in the other modes
        episodes.decide(acting, choices)
        terminated = episodes.over
        terminated[resetting] = False
        done, going = np.flatnonzero(terminated), acting[~terminated[acting]]
        rewards = episodes.no_rewards(n)
        done_infos, rewards[done] = episodes.results(done)
        going_infos, rewards[going] = episodes.results(going)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            self._show(terminated, (done, done_infos), rewards)
            final = {}
            if len(done):
                final = final_infos(terminated, unbatched(episodes.observe()), done_infos)
                episodes.begin(done, self._random_rows(done))
            infos = infos_of_all(n, (done, episodes.infos(done)), (going, going_infos)) | final
        else:
            episodes.begin(resetting, self._random_rows(resetting))
            self._show(terminated, (done, done_infos), rewards)
            infos = infos_of_all(n, (done, done_infos), (going, going_infos), (resetting, episodes.infos(resetting)))
        return episodes.observe(), rewards, terminated, np.zeros(n, dtype=np.bool_), infos

    def action_masks(self) -> NDArray:
        """Choices that are allowed, bool ``[num_envs, choices]``; see ``SwitchableEnv.action_masks``."""
        return self._episodes.masks()

    def render(self) -> tuple[str | NDArray, ...] | None:
        """One picture per env, as ``SwitchableEnv.render``: after a step, of the instances that were decided on."""
        if self.render_mode is None or self._shown is None:
            return None
        return tuple(pictures(self.core, self._shown, self.render_mode))

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as plain values; call it after ``reset``."""
        random: Any = self.np_random
        own = isinstance(random, tuple)
        return {
            "random": [generator.bit_generator.state for generator in random] if own else random.bit_generator.state,
            "split": self._episodes.split.name,
            "rows": self._episodes.rows.tolist(),
            "episodes": self._episodes.state(),
        }

    def load_state(self, state: dict[str, Any]) -> Observations:
        """Restore what ``state`` returned; returns the observations to decide on next."""
        random, episodes = state["random"], self._episodes
        self._np_random = _generator(random) if isinstance(random, dict) else tuple(map(_generator, random))
        episodes.split = self.core.split(state["split"])
        episodes.rows = np.array(state["rows"])
        episodes.load_state(state["episodes"])
        self._show(np.zeros(self.num_envs, dtype=np.bool_))
        return episodes.observe()

    def _show(
        self,
        decided: NDArray,
        outcome: tuple[NDArray, dict[str, NDArray]] | None = None,
        rewards: NDArray | None = None,
    ) -> None:
        """Keep what ``render`` shows, if there is a render mode; without an outcome, the last outcome stays."""
        if self.render_mode is None:
            return
        episodes, shown = self._episodes, self._shown
        infos, last = ({}, episodes.no_rewards(self.num_envs)) if shown is None else (shown.infos, shown.rewards)
        if outcome is not None and rewards is not None:
            infos, last = infos_of_all(self.num_envs, outcome), rewards.copy()
        self._shown = Shown(episodes.backbone_split, episodes.rows.copy(), decided.copy(), infos, last)

    def _envs_to_reset(self, options: dict[str, Any]) -> NDArray:
        """The envs to reset. Takes ``reset_mask`` out of the options; with it, the default split is the current one."""
        if "reset_mask" not in options:
            return np.arange(self.num_envs)
        mask = options.pop("reset_mask")
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"expected an array of booleans for reset_mask, got {getattr(mask, 'dtype', type(mask))}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"expected a reset_mask of shape {(self.num_envs,)} with at least one True, got {mask}")
        begun = self._episodes.is_begun
        if begun:
            options.setdefault("split", self._episodes.split.name)
        if not mask.all():
            if not begun:
                raise gym.error.ResetNeeded("the first reset has to be one of all envs")
            if options["split"] != self._episodes.split.name:
                raise ValueError(
                    f"some envs cannot be reset to the split {options['split']!r} while the others are on "
                    f"{self._episodes.split.name!r}; reset all of them"
                )
        return np.flatnonzero(mask)

    def _seed(self, seed: int | Sequence[int | None] | None, envs: NDArray) -> None:
        if not isinstance(seed, Sequence | np.ndarray):
            super().reset(seed=seed)  # raises unless it is a number
            return
        if len(seed) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} seeds, one per env, got {len(seed)}")
        own = isinstance(self._np_random, tuple)
        generators: list[Any] = list(self._np_random) if own else [None] * self.num_envs
        seeds: list[Any] = list(self._np_random_seed) if own else [None] * self.num_envs
        for env in range(self.num_envs):
            new = seed[env] if env in envs else None
            if new is not None or generators[env] is None:
                generators[env], seeds[env] = seeding.np_random(new)
        self._np_random = tuple(generators)
        self._np_random_seed = tuple(seeds)

    def _random_rows(self, envs: NDArray) -> NDArray:
        """New rows for some envs: from the common generator, or each from the env's own."""
        random, instances = self.np_random, len(self._episodes.split)
        if isinstance(random, np.random.Generator):
            return random.integers(instances, size=len(envs))
        return np.array([random[env].integers(instances, size=1)[0] for env in envs], dtype=np.int64)


def _generator(state: dict[str, Any]) -> np.random.Generator:
    generator, _ = seeding.np_random(0)
    generator.bit_generator.state = state
    return generator


def _checked_mode(given: str | AutoresetMode) -> AutoresetMode:
    """The autoreset mode; ``ValueError`` if it is unknown, or RLlib would lose episodes in it."""
    if given not in [*AutoresetMode, *(mode.value for mode in AutoresetMode)]:
        known = ", ".join(mode.value for mode in AutoresetMode)
        raise ValueError(f"autoreset_mode must be one of {known}, got {given!r}")
    mode = AutoresetMode(given)
    if mode == AutoresetMode.SAME_STEP and _is_called_by("ray.rllib.env."):
        raise ValueError(
            "RLlib's sampler loses every second one-step episode under autoreset_mode 'SameStep'; add "
            '"autoreset_mode": "NextStep" to env_config'
        )
    return mode


def _is_called_by(package: str) -> bool:
    """Whether a module of a package is among the callers: RLlib does not tell an env that it steps it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(package):
        frame = frame.f_back
    return frame is not None
