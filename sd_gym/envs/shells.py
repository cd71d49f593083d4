"""The core as a ``gymnasium.Env`` and as a ``gymnasium.vector.VectorEnv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from sd_gym.envs.config import EnvConfig, load_config
from sd_gym.envs.core import OBSERVATION_LIMIT, Core, Outcome, shared_core
from sd_gym.envs.render import Shown, pictures
from sd_gym.envs.split import Split
from sd_gym.envs.window import HAS_PYGAME, Window
from sd_gym.registration import CONFIG_FOLDER

RENDER_MODES = ("ansi", "rgb_array")
# Gymnasium's checker tries every mode that an env declares, so a window is declared only where one can be opened.
SINGLE_RENDER_MODES = (*RENDER_MODES, "human") if HAS_PYGAME else RENDER_MODES


def spaces(core: Core) -> tuple[gym.spaces.Box, gym.spaces.MultiDiscrete]:
    """Observation and action space of one env."""
    size = core.observation_mean.shape
    observation = gym.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, size, np.float32)
    return observation, gym.spaces.MultiDiscrete(core.nvec)


def check_render_mode(render_mode: str | None, modes: tuple[str, ...]) -> None:
    """Raise ``ValueError`` for a mode that there is not."""
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode must be one of {', '.join(modes)} or None, got {render_mode!r}")


def draw(core: Core, random: np.random.Generator, n: int, options: dict[str, Any] | None) -> tuple[Split, NDArray]:
    """The split and rows that a reset with these options starts on.

    Args:
        core: The env's core.
        random: Where random rows are drawn from.
        n: How many.
        options: ``{"split": name}`` and ``{"instance": id}`` (a list of ids for a vector env) choose what to decide on.

    Raises:
        ValueError: If an option or its value is unknown.
    """
    options = options or {}
    unknown = set(options) - {"split", "instance"}
    if unknown:
        raise ValueError(f"unknown reset option {sorted(unknown)[0]!r}; expected 'split' or 'instance'")
    name = options.get("split", core.config.split)
    if name not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {name!r}; expected train, validation or test")
    split = core.split(name)
    if "instance" not in options:
        return split, random.integers(len(split), size=n)
    wanted = options["instance"]
    ids = [wanted] * n if isinstance(wanted, str) else list(wanted)
    if len(ids) != n:
        raise ValueError(f"expected {n} instance ids, one an env, got {len(ids)}")
    for identity in ids:
        if identity not in split.number_of:
            raise ValueError(f"no instance {identity!r} in the {name} split; ids run from {split.instances[0].id!r} on")
    return split, np.array([split.number_of[identity] for identity in ids])


def text_infos(split: Split, rows: NDArray) -> dict[str, NDArray]:
    """The texts of instances, one array of ``n`` values a key: see ``info_text`` of ``SwitchableEnv``."""
    instances = [split.instances[row] for row in rows]
    texts = {"source": [one.source for one in instances], "reference": [split.reference(row) for row in rows]}
    if split.paired:
        texts["source_pair"] = [one.source_pair for one in instances]
    return {key: np.array(values, dtype=object) for key, values in texts.items()}


def step_infos(split: Split, rows: NDArray, decisions: NDArray, outcome: Outcome) -> dict[str, NDArray]:
    """The documented info of a step, one array of ``n`` values a key."""
    return {
        "quality": outcome.quality,
        "quality_ref": outcome.quality_ref,
        "cost": outcome.cost,
        "flops_ratio": outcome.flops_ratio,
        "vector_reward": np.stack([outcome.quality, -outcome.flops_ratio], axis=1),
        "is_success": outcome.cost == 0,
        "instance": np.array([split.instances[row].id for row in rows], dtype=object),
        "difficulty": split.difficulty[rows],
        "decision": np.array(decisions, dtype=np.int64),
    }


class SwitchableEnv(gym.Env, EzPickle):
    """Decide, for one input, which parts of a transformer to skip.

    Description:
        Each episode is one instance of an NLP task and one decision (a contextual bandit): the backbone runs the
        instance under the decision, what is skipped is not executed, and the episode terminates.

    Action Space:
        ``MultiDiscrete([2] * switches + [token levels])``: 1 = skip the sublayer; the last component chooses the
        share of tokens to drop, one of the config's ``token_shares``. All zeros = dense.

    Observation Space:
        ``Box(-10, 10, (2 * width + 2,), float32)``: mean and maximum over tokens of the first layer's input, the
        length and its logarithm, standardised on the training split.

    Reward:
        The config's ``objective`` with its ``epsilon``, ``penalty`` and ``cost_scale`` (``sd_gym.objectives``). The
        default is lexicographic: savings (1 - flops_ratio) if the quality is kept, -penalty * min(1, cost /
        cost_scale) if not. ``lagrangian`` moves its penalty with the mean quality, so its rewards depend on the
        decisions before.

    Episode End:
        Terminates after one step; never truncates.

    Info:
        reset: ``instance`` (id), ``difficulty``. step: these and ``quality``, ``quality_ref``, ``cost``,
        ``flops_ratio``, ``vector_reward`` = [quality, -flops_ratio], ``is_success`` (cost == 0), ``decision``. With
        ``info_text`` both also have ``source``, ``reference`` (the right answer, the first of several, empty if there
        is none) and, where inputs are pairs of texts, ``source_pair``.

    Arguments:
        config_file: Name of a file in ``envs_configs/``, or the path of any such file.
        render_mode: ``ansi`` (lines of text), ``rgb_array`` (a picture, 960 by 720), ``human`` (the picture in a
            window, which pygame opens), or ``None``. Each shows the text and what of it was dropped, which sublayers
            ran, the answer beside the right one, FLOPs, quality and reward of the last step; after a reset the text
            alone. Nothing is generated or drawn until it is asked for.
        info_text: Whether infos hold the texts of the instance; off, since copying them costs.
        overrides: Any key of the config. ``reset(options={"split": ..., "instance": id})`` picks what to decide on.

    Version History:
        * v0: first version.

    Raises:
        ConfigError: If a config key or value is wrong.
        FileNotFoundError: If the data set or the backbone does not exist.
        DataError: If the data set is malformed.
        UnsupportedArchitectureError: If the backbone cannot be switched.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": list(SINGLE_RENDER_MODES), "render_fps": 1}

    def __init__(
        self, config_file: str, render_mode: str | None = None, info_text: bool = False, **overrides: Any
    ) -> None:
        EzPickle.__init__(self, config_file, render_mode, info_text, **overrides)
        self._window = Window() if render_mode == "human" else None
        check_render_mode(render_mode, SINGLE_RENDER_MODES)
        self.config = read_config(config_file, overrides)
        self.core = shared_core(self.config)
        self.objective = self.config.make_objective()
        self.observation_space, self.action_space = spaces(self.core)
        self.render_mode = render_mode
        self.info_text = info_text
        self._split: Split | None = None
        self._row: NDArray | None = None
        self._decision: NDArray | None = None
        self._shown: Shown | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray, dict[str, Any]]:
        """Draw an instance; see the class for ``options``. Raises ``ValueError`` for an unknown one."""
        super().reset(seed=seed)
        self._split, self._row = draw(self.core, self.np_random, 1, options)
        self._decision = None
        instance = self._split.instances[self._row[0]]
        self._show(Shown(self._split, self._row, np.array([False]), {}))
        return self._observation(), {"instance": instance.id, "difficulty": instance.difficulty} | self._texts()

    def step(self, action: NDArray) -> tuple[NDArray, float, bool, bool, dict[str, Any]]:
        """Run the backbone under the decision ``action [switches + 1]``.

        Raises:
            ValueError: If the action is malformed.
            gymnasium.error.ResetNeeded: If the episode is over.
        """
        if self._split is None or self._decision is not None:
            raise gym.error.ResetNeeded("an episode is one decision: call reset() before the next step()")
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"expected an action of shape {self.action_space.shape}, got {action.shape}")
        outcome = self.core.score(self._split, self._row, action[None])
        self._decision = action.astype(np.int64)
        infos = step_infos(self._split, self._row, action[None], outcome)
        info = {key: value[0].item() if value[0].__class__ in _SCALARS else value[0] for key, value in infos.items()}
        reward = self.objective.rewards(outcome.quality, outcome.quality_ref, outcome.flops_ratio)
        self._show(Shown(self._split, self._row, np.array([True]), infos, reward))
        return self._observation(), float(reward[0]), True, False, info | self._texts()

    def render(self) -> str | NDArray | None:
        """What came of the last step, or after a reset what there is to decide on, as the render mode says."""
        if self.render_mode is None or self._shown is None:
            return None
        (picture,) = pictures(self.core, self._shown, self.render_mode)
        if self._window is None:
            return picture
        self._window.show(picture, self.metadata["render_fps"])
        return None

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            self._window.close()

    def _show(self, shown: Shown) -> None:
        self._shown = shown
        if self._window is not None:
            self.render()

    def _texts(self) -> dict[str, str]:
        if not self.info_text:
            return {}
        return {key: value for key, (value,) in text_infos(self._split, self._row).items()}

    def _observation(self) -> NDArray:
        return self.core.observe(self._split, self._row)[0]


_SCALARS = (np.float64, np.int64, np.bool_)


class SwitchableVectorEnv(VectorEnv):
    """``SwitchableEnv`` for a batch: one forward pass of the backbone a step serves all ``num_envs`` instances.

    Every episode is one step, so every step resets in the same step: observations are those of the next instances,
    ``infos["final_info"]`` holds the step's info and ``infos["final_obs"]`` the observations that were decided on.

    Args:
        config_file: As for ``SwitchableEnv``.
        num_envs: Batch size.
        render_mode: As for ``SwitchableEnv``, one picture an env; there are no windows.
        info_text: As for ``SwitchableEnv``.
        overrides: Any key of the config.

    Raises:
        As ``SwitchableEnv``.
    """

    metadata: ClassVar[dict[str, Any]] = {
        **SwitchableEnv.metadata,
        "render_modes": list(RENDER_MODES),
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        config_file: str,
        num_envs: int = 1,
        render_mode: str | None = None,
        info_text: bool = False,
        **overrides: Any,
    ) -> None:
        check_render_mode(render_mode, RENDER_MODES)
        self.config = read_config(config_file, overrides)
        self.core = shared_core(self.config)
        self.objective = self.config.make_objective()
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.info_text = info_text
        self.single_observation_space, self.single_action_space = spaces(self.core)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._split: Split | None = None
        self._rows: NDArray | None = None
        self._shown: Shown | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray, dict[str, Any]]:
        """Draw ``num_envs`` instances; options as for ``SwitchableEnv``, ``instance`` may be a list of ids."""
        super().reset(seed=seed)
        self._split, self._rows = draw(self.core, self.np_random, self.num_envs, options)
        self._shown = Shown(self._split, self._rows, ~self._all(), {})
        return self.core.observe(self._split, self._rows), self._reset_infos()

    def step(self, actions: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray, dict[str, Any]]:
        """Run the backbone under the decisions ``actions [num_envs, switches + 1]``, then draw the next instances.

        Raises:
            ValueError: If the actions are malformed.
            gymnasium.error.ResetNeeded: If ``reset`` was never called.
        """
        if self._split is None:
            raise gym.error.ResetNeeded("call reset() before the first step()")
        outcome = self.core.score(self._split, self._rows, actions)
        rewards = self.objective.rewards(outcome.quality, outcome.quality_ref, outcome.flops_ratio)
        final = step_infos(self._split, self._rows, actions, outcome)
        self._shown = Shown(self._split, self._rows, self._all(), final, rewards)
        if self.info_text:
            final |= text_infos(self._split, self._rows)
        final_observations = np.empty(self.num_envs, dtype=object)
        final_observations[:] = list(self.core.observe(self._split, self._rows))
        self._rows = self.np_random.integers(len(self._split), size=self.num_envs)
        infos = self._reset_infos()
        infos |= {"final_obs": final_observations, "_final_obs": self._all()}
        infos |= {"final_info": self._masked(final), "_final_info": self._all()}
        ended = self._all()
        return self.core.observe(self._split, self._rows), rewards, ended, ~ended, infos

    def render(self) -> tuple[str | NDArray, ...] | None:
        """One picture an env, as ``SwitchableEnv.render``: after a step, of the instances that were decided on."""
        if self.render_mode is None or self._shown is None:
            return None
        return tuple(pictures(self.core, self._shown, self.render_mode))

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as plain values; after ``reset``."""
        return {
            "random": self.np_random.bit_generator.state,
            "split": self._split.name,
            "rows": self._rows.tolist(),
            "multiplier": self.objective.multiplier,
        }

    def load_state(self, state: dict[str, Any]) -> NDArray:
        """Go on from what ``state`` gave; returns the observations ``[num_envs, features]`` to decide on next."""
        self.np_random.bit_generator.state = state["random"]
        self._split, self._rows = self.core.split(state["split"]), np.array(state["rows"])
        self._shown = Shown(self._split, self._rows, ~self._all(), {})
        self.objective.multiplier = state["multiplier"]
        return self.core.observe(self._split, self._rows)

    def _reset_infos(self) -> dict[str, Any]:
        ids = np.array([self._split.instances[row].id for row in self._rows], dtype=object)
        infos = {"instance": ids, "difficulty": self._split.difficulty[self._rows]}
        return self._masked(infos | text_infos(self._split, self._rows) if self.info_text else infos)

    def _masked(self, infos: dict[str, NDArray]) -> dict[str, NDArray]:
        return infos | {f"_{key}": self._all() for key in infos}

    def _all(self) -> NDArray:
        return np.ones(self.num_envs, dtype=np.bool_)


def read_config(config_file: str, overrides: dict[str, Any]) -> EnvConfig:
    """The config of a file in ``envs_configs/``, or of any path, with overrides; raises as ``load_config``."""
    bundled = CONFIG_FOLDER / config_file
    return load_config(bundled if bundled.exists() else Path(config_file), overrides)
