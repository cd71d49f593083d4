"""The queues as a ``gymnasium.Env`` and as a ``gymnasium.vector.VectorEnv``."""

from collections.abc import Sequence
from typing import Any, get_args

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from sd_gym.config import SplitName
from sd_gym.envs.infos import check_shown, checked_options, info_of_one
from sd_gym.envs.serving.config import make_serving_config
from sd_gym.envs.serving.queues import BOUND, FEATURES, Queues

Array = NDArray
METADATA: dict[str, Any] = {"render_modes": [], "render_fps": 1}
_ONE = np.zeros(1, dtype=np.int64)  # the only queue of a batch of one


class ServingEnv(gym.Env[Array, Any]):
    """A queue in front of a server. Each step chooses the operating point of the model for the next group of requests.

    Description:
        Requests arrive at random, each with a deadline. A free server takes the oldest ones, at most ``max_batch``,
        and answers them together. At the operating point ``k`` this takes ``a_k * n + b_k`` seconds, as measured. Bold
        points are faster and lose quality. Requests that cannot be answered within their deadline are refused. Each
        request is a row of a table of real outcomes (``sd_gym.envs.TableEnv``), drawn uniformly. The aim is as many
        answers as possible while the mean of quality_ref - quality over them is at most ``epsilon``. Actions change
        the later queue: it is a long-horizon problem, not a bandit.

    Action Space:
        ``Discrete(K)``: the operating point for the next group. 0 is dense, later ones are bolder.

    Observation Space:
        ``Box(-10, 10, (4,), float32)``:

        * the number of waiting requests, over what dense answers within a deadline;
        * the oldest one's wait, over the deadline;
        * the rate of arrivals within the last ``deadline`` seconds, over what dense answers in that time;
        * the recent quality: the expected loss, from policy rows, of the points of about the last thousand answers,
          over ``epsilon``. A server has no labels, but it knows this.

    Reward:
        ``-refused - penalty * cost``, where ``cost`` is the sum of quality_ref - quality over the group's answers. Over
        an episode this is ``answers - requests - penalty * cost``, so it counts the answers in time. A reward per
        answer would not punish slow points, because each step answers a full group.

    Episode End:
        Terminates when all ``requests`` requests are answered or refused, after some thousands of steps. Never
        truncates.

    Info:
        Of the group: ``answers``; ``refused``, requests since the last step; ``quality``, ``quality_ref`` and ``cost``,
        sums over the answers; ``flops_ratio``, their mean, or 0; ``seconds`` of simulated time; ``point``;
        ``vector_reward`` = [answers, -cost]. After a reset all are 0.

    Arguments:
        config_file: YAML file, in ``envs_configs/serving/`` or elsewhere.
        overrides: Any key of it but ``id``: ``arrivals`` (``poisson``, ``bursts``, ``day``), ``load`` (the mean rate
            over what dense can answer), ``deadline``, ``max_batch``, ``requests``, ``epsilon``, ``penalty``, ``split``,
            ``table``, ``points``. ``reset(options={"split": "test"})`` takes the rows of another split.

    Version History:
        * v0: first version.

    Raises:
        ConfigError: If a key or value is wrong, or the table lacks the mask of a point; for an unknown key also a
            ``TypeError``.
        FileNotFoundError: If there is no such file or table.
    """

    metadata = METADATA

    def __init__(self, config_file: str, render_mode: str | None = None, **overrides: Any) -> None:
        check_shown(render_mode, [])
        self.config = make_serving_config(config_file, overrides)
        self.render_mode = render_mode
        self.observation_space, self.action_space = _spaces(len(self.config.points))
        self._queues = Queues(self.config, 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Draw the requests of an episode; see the class for ``options``.

        Raises:
            TypeError: If ``options`` is not a dictionary.
            ValueError: If an option or its value is unknown.
        """
        super().reset(seed=seed)
        self._queues.reset(_ONE, [self.np_random], _split(options, self.config.split))
        return self._queues.observe()[0], info_of_one(_no_infos(1))

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Run the next group at an operating point.

        Raises:
            ValueError: If there is no such point.
            gymnasium.error.ResetNeeded: If the episode is over.
        """
        if self._queues.over[0]:
            raise gym.error.ResetNeeded("the episode is over: call reset() before the next step()")
        infos, rewards = _served(self._queues, _points(action, (), len(self.config.points))[None])
        return self._queues.observe()[0], float(rewards[0]), bool(self._queues.over[0]), False, info_of_one(infos)


class ServingVectorEnv(VectorEnv[Array, Any, Array]):
    """``ServingEnv`` for many queues at once, in ``AutoresetMode.SAME_STEP``.

    A step that ends an episode also starts the next one: its observations and infos are those of the reset;
    ``infos["final_info"]`` and ``infos["final_obs"]`` hold the step's. Arguments and errors are those of
    ``ServingEnv``; ``reset(seed=s)`` seeds queue ``i`` as a single env with ``s + i``.

    Raises:
        ValueError: If ``num_envs`` is below 1; else as ``ServingEnv``.
    """

    metadata = METADATA | {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, config_file: str, num_envs: int = 1, render_mode: str | None = None, **overrides: Any) -> None:
        if isinstance(num_envs, bool) or not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ValueError(f"num_envs: expected an integer of at least 1, got {num_envs!r}")
        check_shown(render_mode, [])
        self.config = make_serving_config(config_file, overrides)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space, self.single_action_space = _spaces(len(self.config.points))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._queues = Queues(self.config, num_envs)
        self._randoms = [seeding.np_random()[0] for _ in range(num_envs)]
        self._split_name = self.config.split

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode in each queue. Raises: see ``ServingEnv.reset``."""
        self._split_name = _split(options, self.config.split)
        seeds = [seed + env for env in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        for env, of_env in enumerate(seeds or ()):
            if of_env is not None:
                self._randoms[env] = seeding.np_random(int(of_env))[0]
        self._begin(np.arange(self.num_envs))
        return self._queues.observe(), _with_presence(_no_infos(self.num_envs))

    def step(self, actions: Any) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Run a group in each queue.

        Raises:
            ValueError: If the actions are malformed.
            gymnasium.error.ResetNeeded: If there was no reset.
        """
        queues, n = self._queues, self.num_envs
        if queues.over.any():
            raise gym.error.ResetNeeded("call reset() before the first step()")
        infos, rewards = _served(queues, _points(actions, (n,), len(self.config.points)))
        ended, observations = queues.over, queues.observe()
        shown = _with_presence(infos)
        if ended.any():
            over = np.flatnonzero(ended)
            final = np.full(n, None, dtype=object)
            for env in over:
                final[env] = observations[env]
            shown = {
                key: np.where(ended if values.ndim == 1 else ended[:, None], 0, values) for key, values in infos.items()
            }
            shown = _with_presence(shown)
            shown |= {"final_obs": final, "_final_obs": ended.copy()}
            shown |= {"final_info": _with_presence(infos, ended), "_final_info": ended.copy()}
            self._begin(over)
            observations = queues.observe()
        return observations, rewards, ended, np.zeros(n, dtype=np.bool_), shown

    def _begin(self, envs: Array) -> None:
        self._queues.reset(envs, [self._randoms[env] for env in envs], self._split_name)


def _spaces(points: int) -> tuple[gym.spaces.Box, gym.spaces.Discrete]:
    return gym.spaces.Box(-BOUND, BOUND, (len(FEATURES),), np.float32), gym.spaces.Discrete(points)


def _split(options: dict[str, Any] | None, default: str) -> str:
    """The split of a reset with these options."""
    options = checked_options(options)
    if unknown := sorted(set(options) - {"split"}, key=str):
        raise ValueError(f"unknown reset option {unknown[0]!r}; expected 'split'")
    split = options.get("split", default)
    if split not in get_args(SplitName):
        raise ValueError(f"unknown split {split!r}; expected {', '.join(get_args(SplitName))}")
    return split


def _points(actions: Any, shape: tuple[int, ...], points: int) -> Array:
    """Actions as int64; raises ``ValueError`` if they are malformed."""
    array = np.asarray(actions)
    if array.shape != shape or array.dtype.kind not in "iu" or (array < 0).any() or (array >= points).any():
        raise ValueError(f"expected integers of shape {shape} from 0 to {points - 1}, got {actions!r}")
    return array.astype(np.int64)


def _served(queues: Queues, points: Array) -> tuple[dict[str, Array], Array]:
    """Infos and rewards of a step."""
    infos = queues.serve(points)
    rewards = -infos["refused"] - queues.config.penalty * infos["cost"]
    return infos | {"vector_reward": np.stack([infos["answers"], -infos["cost"]], axis=1)}, rewards


def _no_infos(n: int) -> dict[str, Array]:
    """Infos of a reset."""
    counts = {key: np.zeros(n, dtype=np.int64) for key in ("answers", "refused", "point")}
    sums = {key: np.zeros(n) for key in ("quality", "quality_ref", "cost", "flops_ratio", "seconds")}
    return counts | sums | {"vector_reward": np.zeros((n, 2))}


def _with_presence(infos: dict[str, Array], present: Array | None = None) -> dict[str, Any]:
    """Infos of a vector env, with an array ``_key`` per key that marks the queues that have it."""
    marks = np.ones(len(infos["point"]), dtype=np.bool_) if present is None else present
    return infos | {f"_{key}": marks.copy() for key in infos}
