"""The core as a ``gymnasium.Env`` and as a ``gymnasium.vector.VectorEnv``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from sd_gym.envs.config import EnvConfig, load_config
from sd_gym.envs.outcome import Outcome
from sd_gym.envs.render import Shown, pictures
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import Observations, as_array, each, reward_space, spaces
from sd_gym.envs.window import HAS_PYGAME, Window
from sd_gym.objectives import Objective
from sd_gym.registration import CONFIG_FOLDER

if TYPE_CHECKING:  # an env of a table needs no torch
    from sd_gym.envs.core import Core
    from sd_gym.envs.episodes import Episodes
    from sd_gym.envs.split import Split

RENDER_MODES = ("ansi", "rgb_array")
# Gymnasium's checker tries every mode that an env declares, so a window is declared only where one can be opened.
SINGLE_RENDER_MODES = (*RENDER_MODES, "human") if HAS_PYGAME else RENDER_MODES
KNOWN_AT_RESET = ("instance", "difficulty")


def check_shown(render_mode: str | None, info_text: bool, modes: Sequence[str]) -> None:
    """Raise ``ValueError`` for a mode that there is not; without any mode there are no texts either."""
    if not modes and (render_mode is not None or info_text):
        asked = "info_text" if render_mode is None else f"render_mode={render_mode!r}"
        raise ValueError(f"a table has outcomes and no texts, so there is nothing to show; leave out {asked}")
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode must be one of {', '.join(modes)} or None, got {render_mode!r}")


def chosen(core: Core, n: int, options: dict[str, Any] | None) -> tuple[Split, NDArray | None]:
    """The split that a reset with these options starts on, and the rows ``[n]``; ``None``: they are to be drawn.

    Args:
        core: The env's core.
        n: How many envs there are.
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
        "decision": core.spelled(decisions),
    }


def reset_infos(core: Core, split: Split, rows: NDArray) -> dict[str, NDArray]:
    """The documented info of a reset: that of a step, with zeros for all that no decision has decided yet."""
    nothing = Outcome(*np.zeros((4, len(rows))))
    infos = step_infos(core, split, rows, np.zeros((len(rows), len(core.nvec)), dtype=np.int64), nothing)
    return {key: values if key in KNOWN_AT_RESET else np.zeros_like(values) for key, values in infos.items()}


def episode_infos(core: Core, split: Split, rows: NDArray, episodes: Episodes, envs: NDArray) -> dict[str, NDArray]:
    """The info of some envs that are not yet over: that of a reset, and what is decided so far."""
    infos = reset_infos(core, split, rows[envs]) | {"decision": core.spelled(episodes.decisions[envs])}
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
    return {key: _objects(values) for key, values in texts.items()}


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


class SwitchableEnv(gym.Env):
    """Decide, for one input, which parts of a transformer to skip.

    Description:
        Each episode is one instance of an NLP task and one decision (a contextual bandit): the backbone runs the
        instance under the decision, what is skipped is not executed, and the episode terminates. ``copy.deepcopy`` and
        ``pickle`` keep the running episode and the random state; the backbone is shared, not copied.

        With several ``stages`` an episode is one instance and as many steps: each looks at what the pass has computed
        so far and decides the switches up to the next stage.

    Action Space:
        ``action="multi_discrete"`` (default): ``MultiDiscrete([2] * switches + [token levels])``: 1 = skip the
        sublayer; the last component chooses the share of tokens to drop, one of the config's ``token_shares``. All
        zeros = dense. With ``candidates``, switches of other kinds have one choice: they run.

        ``"multi_binary"``: ``MultiBinary(switches)``, the same where there is one token level only.

        ``"discrete"``: ``Discrete(K)``, one of the K masks of the config's ``codebook``; in the codebooks of the Mini
        envs the masks are nested, and the first one is dense.

        With several stages, ``MultiDiscrete`` (or ``MultiBinary``) of the stage that has the most switches; what a
        stage has fewer is passed over, and so is the token level at any stage but ``first``.

    Observation Space:
        ``observation="pooled"`` (default): ``Box(-10, 10, (2 * width + 2,), float32)``: mean and maximum over tokens of
        the first layer's input, the length and its logarithm, standardised on the training split.

        ``"tokens"``: ``Dict(tokens=Box(-10, 10, (max_source_length, width), float32),
        mask=MultiBinary(max_source_length))``, the first layer's input itself, standardised too and padded with zeros.

        Any name that ``sd_gym.register_observation`` was given: the space of that class.

        With several stages, ``Box(-10, 10, (stages + 1 + 2 * width + 2,), float32)``: the stage, one-hot, the share of
        the FLOPs spent, then mean and maximum of the hidden states there, their number and its logarithm, standardised
        for each stage, and where the head can judge a layer, the log-odds of its answer (``StageObservation``).

    Reward:
        The config's ``objective`` with its ``epsilon``, ``penalty`` and ``cost_scale`` (``sd_gym.objectives``). The
        default is lexicographic: savings (1 - flops_ratio) if the quality is kept, -penalty * min(1, cost /
        cost_scale) if not. The same outcome always earns the same. A penalty that learns belongs to the agent
        (``ppo_lagrangian``, ``a2c_lagrangian``), or to ``sd_gym.envs.wrappers.LagrangianWrapper``.

        ``vector_reward=True``: ``[quality, -flops_ratio]``, float32, within ``reward_space``, as MO-Gymnasium has it;
        the objective plays no part. ``sd_gym.envs.wrappers.SafetyWrapper`` steps with a cost beside the reward.

        With several stages it comes at the end, and is that of the same decision in one step. ``dense_reward=True``:
        each step pays for what it has saved, the last one the rest.

    Episode End:
        Terminates after the last stage (of one: after one step); never truncates.

    Info:
        step: ``quality``, ``quality_ref``, ``cost``, ``flops_ratio``, ``vector_reward`` = [quality, -flops_ratio],
        ``is_success`` (cost == 0), ``instance`` (id), ``difficulty``, ``decision``. reset: the same keys (so that
        recorders can stack infos), of which only ``instance`` and ``difficulty`` are known; the others are zeros (and
        ``is_success`` is ``False``), since nothing was decided yet. With ``info_text`` both also have ``source``,
        ``reference`` (the right answer, the first of several, empty if there is none) and, where inputs are pairs of
        texts, ``source_pair``. With several stages both also have ``action_mask``, int8 ``[choices]``: which choices
        the next step has; a step that is not the last one has the info of a reset, and the ``decision`` so far.

    Arguments:
        config_file: Name of a file in ``envs_configs/``, or the path of any such file.
        render_mode: ``ansi`` (lines of text), ``rgb_array`` (a picture, 960 by 720), ``human`` (the picture in a
            window, which pygame opens), or ``None``. Each shows the text and what of it was dropped, which sublayers
            ran, the answer beside the right one, FLOPs, quality and reward of the last step; after a reset the text
            alone. Nothing is generated or drawn until it is asked for.
        info_text: Whether infos hold the texts of the instance; off, since copying them costs.
        overrides: Any key of the config, ``action``, ``codebook``, ``observation`` and ``vector_reward`` among them.
            ``reset(options={"split": ..., "instance": id})`` picks what to decide on.

    Version History:
        * v0: first version.

    Raises:
        ConfigError: If a config key or value is wrong; an unknown key's is a ``TypeError`` too.
        FileNotFoundError: If the data set, the backbone or the codebook does not exist.
        DataError: If the data set is malformed.
        UnsupportedArchitectureError: If the backbone cannot be switched.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": list(SINGLE_RENDER_MODES), "render_fps": 1}

    def __init__(
        self, config_file: str, render_mode: str | None = None, info_text: bool = False, **overrides: Any
    ) -> None:
        self._window = Window() if render_mode == "human" else None
        check_shown(render_mode, info_text, type(self).metadata["render_modes"])
        self.config = read_config(config_file, overrides)
        self.core = shared_core(self.config)
        self.objective = Objective(self.config.reward)
        self.observation_space, self.action_space = spaces(self.core)
        if self.config.reward.vector:
            self.reward_space = reward_space(self.config)
        self.render_mode = render_mode
        self.info_text = info_text
        self._split: Split | None = None
        self._row: NDArray | None = None
        self._episode = self.core.episodes(1)
        self._shown: Shown | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Draw an instance; see the class for ``options``. Raises ``ValueError`` for an unknown one."""
        super().reset(seed=seed)
        self._split, row = chosen(self.core, 1, options)
        self._row = self.np_random.integers(len(self._split), size=1) if row is None else row
        self._episode.begin(_ONE)
        self._show(Shown(self._split, self._row, np.array([False]), {}))
        infos = episode_infos(self.core, self._split, self._row, self._episode, _ONE)
        return self._observation(), info_of_one(infos | text_infos(self._split, self._row, self.info_text))

    def step(self, action: Any) -> tuple[Any, float | NDArray, bool, bool, dict[str, Any]]:
        """Run the backbone under the decision that an action of the action space stands for.

        Raises:
            ValueError: If the action is malformed.
            gymnasium.error.ResetNeeded: If the episode is over.
        """
        if self._split is None or self._episode.over.all():
            raise gym.error.ResetNeeded("the episode is over: call reset() before the next step()")
        action = as_array(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"expected an action of shape {self.action_space.shape}, got {action.shape}")
        self._episode.decide(_ONE, self.core.actions.decisions(action[None], 1))
        over = bool(self._episode.over[0])
        infos, rewards = decided(self.config, self.core, self.objective, self._split, self._row, self._episode, _ONE)
        self._show(Shown(self._split, self._row, np.array([over]), infos if over else {}, rewards if over else None))
        info, reward = info_of_one(infos | text_infos(self._split, self._row, self.info_text)), rewards[0]
        return self._observation(), reward if self.config.reward.vector else float(reward), over, False, info

    def action_masks(self) -> NDArray:
        """Which choices are allowed, bool ``[choices]``: all (what sb3-contrib's maskable algorithms ask for)."""
        return self._episode.masks()[0]

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

    def _observation(self) -> Any:
        return each(self._episode.observe(self._split, self._row))[0]


_ONE = np.zeros(1, dtype=np.int64)  # the only env of a batch of one
_SCALARS = (np.float64, np.int64, np.bool_)


class SwitchableVectorEnv(VectorEnv):
    """``SwitchableEnv`` for a batch: one forward pass of the backbone a step serves all ``num_envs`` instances.

    Every episode has as many steps as stages, so that all end with the same step, but behind a masked reset. What comes
    then is Gymnasium's ``AutoresetMode``, as ``SyncVectorEnv`` has it:

    * ``SAME_STEP`` (default): the step resets too. Its observations are those of the next instances and its infos
      those of their reset; ``infos["final_info"]`` holds the step's info and ``infos["final_obs"]`` the observations
      that were decided on.
    * ``NEXT_STEP``: infos and observations are the step's; the next step ignores its actions, resets, and gives no
      reward, so every other step decides nothing.
    * ``DISABLED``: ``reset(options={"reset_mask": mask})`` resets the masked envs; before, no step is possible.

    Args:
        config_file: As for ``SwitchableEnv``.
        num_envs: Batch size.
        render_mode: As for ``SwitchableEnv``, one picture an env; there are no windows.
        info_text: As for ``SwitchableEnv``.
        autoreset_mode: An ``AutoresetMode`` or its value, as in ``gym.make_vec(id, autoreset_mode="NextStep")``.
        overrides: Any key of the config.

    Raises:
        ValueError: If there is no such autoreset mode; else as ``SwitchableEnv``.
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
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        **overrides: Any,
    ) -> None:
        check_shown(render_mode, info_text, type(self).metadata["render_modes"])
        self.autoreset_mode = read_autoreset_mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.config = read_config(config_file, overrides)
        self.core = shared_core(self.config)
        self.objective = Objective(self.config.reward)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.info_text = info_text
        self.single_observation_space, self.single_action_space = spaces(self.core)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        if self.config.reward.vector:
            self.reward_space = reward_space(self.config)  # of one env, as MO-Gymnasium's vector envs have it
        self._split: Split | None = None
        self._rows: NDArray = np.zeros(num_envs, dtype=np.int64)
        self._episodes = self.core.episodes(num_envs)
        self._shown: Shown | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Draw an instance for each env.

        Args:
            seed: A number seeds one generator, from which the instances of all envs are drawn. A list, a seed an env,
                gives each env a generator of its own, which draws as that of a single env with this seed; ``None`` in
                it leaves an env's generator as it is.
            options: As for ``SwitchableEnv``; ``instance`` may be a list of ids, one an env. ``reset_mask``, bool
                ``[num_envs]``, says which envs are reset; the others keep their instances, and the infos hold nothing
                of them. All envs are on one split, which only a reset of all of them changes.

        Raises:
            ValueError: If a seed or an option is wrong.
            TypeError: If ``reset_mask`` is no array of booleans.
            gymnasium.error.ResetNeeded: If the first reset is not one of all envs.
        """
        options = dict(options or {})
        envs = self._envs_to_reset(options)
        self._seed(seed, envs)
        self._split, rows = chosen(self.core, self.num_envs, options)
        self._rows[envs] = self._random_rows(envs) if rows is None else rows[envs]
        self._episodes.begin(envs)
        self._show(self._episodes.over)
        return self._observations(), self._infos((envs, self._reset_infos(envs)))

    def step(self, actions: Any) -> tuple[Observations, NDArray, NDArray, NDArray, dict[str, Any]]:
        """Run the backbone under the decisions that a batch of actions stands for; the class says what follows.

        Raises:
            ValueError: If the actions are malformed.
            gymnasium.error.ResetNeeded: If an env has to be reset first.
        """
        if self._split is None:
            raise gym.error.ResetNeeded("call reset() before the first step()")
        over = self._episodes.over
        if self.autoreset_mode == AutoresetMode.DISABLED and over.any():
            raise gym.error.ResetNeeded(
                f"the episodes of envs {np.flatnonzero(over).tolist()} are over and autoreset is disabled: call "
                'reset(options={"reset_mask": terminated}) before the next step()'
            )
        choices = self.core.actions.decisions(actions, self.num_envs)
        deciding, reset = np.flatnonzero(~over), np.flatnonzero(over)
        self._episodes.decide(deciding, choices)
        ended, rewards = self._episodes.over, no_rewards(self.config, self.num_envs)
        ended[reset] = False
        done, going = np.flatnonzero(ended), deciding[~ended[deciding]]
        outcome, rewards[done] = self._decide(done)
        under_way, rewards[going] = self._decide(going)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            self._show(ended, (done, outcome), rewards)
            final: dict[str, Any] = {}
            if len(done):
                final = {"final_obs": _objects(each(self._observations())), "_final_obs": ended.copy()}
                final |= {"final_info": self._infos((done, outcome)), "_final_info": ended.copy()}
                self._rows[done] = self._random_rows(done)
                self._episodes.begin(done)
            infos = self._infos((done, self._reset_infos(done)), (going, under_way)) | final
        else:
            self._rows[reset] = self._random_rows(reset)
            self._episodes.begin(reset)
            self._show(ended, (done, outcome), rewards)
            infos = self._infos((done, outcome), (going, under_way), (reset, self._reset_infos(reset)))
        return self._observations(), rewards, ended, np.zeros(self.num_envs, dtype=np.bool_), infos

    def action_masks(self) -> NDArray:
        """Which choices are allowed, bool ``[num_envs, choices]``: all, as of ``SwitchableEnv``."""
        return self._episodes.masks()

    def render(self) -> tuple[str | NDArray, ...] | None:
        """One picture an env, as ``SwitchableEnv.render``: after a step, of the instances that were decided on."""
        if self.render_mode is None or self._shown is None:
            return None
        return tuple(pictures(self.core, self._shown, self.render_mode))

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as plain values; after ``reset``."""
        random = self.np_random
        own = isinstance(random, tuple)
        return {
            "random": [one.bit_generator.state for one in random] if own else random.bit_generator.state,
            "split": self._split.name,
            "rows": self._rows.tolist(),
            "episodes": self._episodes.state(),
        }

    def load_state(self, state: dict[str, Any]) -> Observations:
        """Go on from what ``state`` gave; returns the observations to decide on next."""
        random = state["random"]
        self.np_random = _generator(random) if isinstance(random, dict) else tuple(_generator(own) for own in random)
        self._split, self._rows = self.core.split(state["split"]), np.array(state["rows"])
        self._episodes.load_state(state["episodes"])
        self._show(np.zeros(self.num_envs, dtype=np.bool_))
        return self._observations()

    def _decide(self, envs: NDArray) -> tuple[dict[str, NDArray], NDArray]:
        """The step infos and the rewards of some envs, a row each: all of them are over, or none is."""
        infos, rewards = decided(self.config, self.core, self.objective, self._split, self._rows, self._episodes, envs)
        return infos | text_infos(self._split, self._rows[envs], self.info_text), rewards

    def _show(
        self,
        decided: NDArray,
        outcome: tuple[NDArray, dict[str, NDArray]] | None = None,
        rewards: NDArray | None = None,
    ) -> None:
        """Keep what there is to show, if anybody may ask; without an outcome, that which there was."""
        if self.render_mode is None:
            return
        if outcome is not None:
            infos, rewards = self._infos(outcome), rewards.copy()
        else:
            infos, rewards = ({}, None) if self._shown is None else (self._shown.infos, self._shown.rewards)
        self._shown = Shown(self._split, self._rows.copy(), decided.copy(), infos, rewards)

    def _envs_to_reset(self, options: dict[str, Any]) -> NDArray:
        """Takes ``reset_mask`` out of the options; a reset that has one stays on the split unless it names another."""
        if "reset_mask" not in options:
            return np.arange(self.num_envs)
        mask = options.pop("reset_mask")
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"expected an array of booleans for reset_mask, got {getattr(mask, 'dtype', type(mask))}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"expected a reset_mask of shape {(self.num_envs,)} that is true somewhere, got {mask}")
        if self._split is not None:
            options.setdefault("split", self._split.name)
        if not mask.all():
            if self._split is None:
                raise gym.error.ResetNeeded("the first reset has to be one of all envs")
            if options["split"] != self._split.name:
                raise ValueError(
                    f"some envs cannot be reset to the split {options['split']!r} while the others are on "
                    f"{self._split.name!r}; reset all of them"
                )
        return np.flatnonzero(mask)

    def _seed(self, seed: int | Sequence[int | None] | None, envs: NDArray) -> None:
        """Seed the one generator, or those of some envs."""
        if seed is None or np.ndim(seed) == 0:
            super().reset(seed=seed)
            return
        if len(seed) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} seeds, one an env, got {len(seed)}")
        own = isinstance(self._np_random, tuple)
        generators = list(self._np_random) if own else [None] * self.num_envs
        seeds = list(self._np_random_seed) if own else [None] * self.num_envs
        for env in range(self.num_envs):
            new = seed[env] if env in envs else None
            if new is not None or generators[env] is None:
                generators[env], seeds[env] = seeding.np_random(new)
        self._np_random, self._np_random_seed = tuple(generators), tuple(seeds)

    def _random_rows(self, envs: NDArray) -> NDArray:
        """New rows for some envs: from the one generator, or each by the env's own."""
        if isinstance(self.np_random, np.random.Generator):
            return self.np_random.integers(len(self._split), size=len(envs))
        drawn = [self.np_random[env].integers(len(self._split), size=1) for env in envs]
        return np.concatenate([np.zeros(0, dtype=np.int64), *drawn])

    def _observations(self) -> Observations:
        return self._episodes.observe(self._split, self._rows)

    def _reset_infos(self, envs: NDArray) -> dict[str, NDArray]:
        infos = episode_infos(self.core, self._split, self._rows, self._episodes, envs)
        return infos | text_infos(self._split, self._rows[envs], self.info_text)

    def _infos(self, *parts: tuple[NDArray, dict[str, NDArray]]) -> dict[str, NDArray]:
        """Infos as ``VectorEnv`` has them, a row an env and a mask ``_key`` for each key, of (envs, their infos)."""
        merged: dict[str, NDArray] = {}
        for envs, infos in parts:
            for key, values in infos.items() if len(envs) else ():
                if key not in merged:
                    nothing = None if values.dtype == object else 0
                    merged[key] = np.full((self.num_envs, *values.shape[1:]), nothing, dtype=values.dtype)
                    merged[f"_{key}"] = np.zeros(self.num_envs, dtype=np.bool_)
                merged[key][envs] = values
                merged[f"_{key}"][envs] = True
        return merged


def read_autoreset_mode(value: str | AutoresetMode) -> AutoresetMode:
    """An autoreset mode, or that of its value; raises ``ValueError`` for any other."""
    try:
        return AutoresetMode(value)
    except ValueError:
        known = ", ".join(mode.value for mode in AutoresetMode)
        raise ValueError(f"autoreset_mode must be one of {known}, got {value!r}") from None


def _objects(values: list[Any]) -> NDArray:
    """An array whose elements are these."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _generator(state: dict[str, Any]) -> np.random.Generator:
    """A generator that goes on from the state of another."""
    generator, _ = seeding.np_random(0)
    generator.bit_generator.state = state
    return generator


def read_config(config_file: str, overrides: dict[str, Any]) -> EnvConfig:
    """The config of a file in ``envs_configs/``, or of any path, with overrides; raises as ``load_config``."""
    bundled = CONFIG_FOLDER / config_file
    return load_config(bundled if bundled.exists() else Path(config_file), overrides)
