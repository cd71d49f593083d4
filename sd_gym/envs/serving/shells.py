"""The queues as a ``gymnasium.Env`` and as a ``gymnasium.vector.VectorEnv``."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray as Array

from sd_gym.envs.infos import check_num_envs, check_render_mode, final_infos, info_of_one, infos_of_all, split_of
from sd_gym.envs.serving.config import make_serving_config
from sd_gym.envs.serving.queues import Queues

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
        For the group: ``answers``; ``refused``, requests since the last step; ``quality``, ``quality_ref`` and
        ``cost``, sums over the answers; ``flops_ratio``, their mean, or 0; ``seconds`` of simulated time; ``point``;
        ``vector_reward`` = [answers, -cost]. After a reset all are 0.

    Arguments:
        config_file: YAML file, in ``envs_configs/serving/`` or elsewhere.
        overrides: Any key of it but ``id``: ``arrivals`` (``poisson``, ``bursts``, ``day``), ``load`` (the mean rate
            over what dense can answer), ``deadline``, ``max_batch``, ``requests``, ``epsilon``, ``penalty``, ``split``,
            ``table``, ``policy``, ``points``. ``reset(options={"split": "test"})`` takes the rows of another split.

    Version History:
        * v0: first version.

    Raises:
        ConfigError: If a key or value is wrong, or the table lacks the mask of a point; for an unknown key also a
            ``TypeError``.
        FileNotFoundError: If there is no such file or table.
    """

    metadata = METADATA

    def __init__(self, config_file: str, render_mode: str | None = None, **overrides: Any) -> None:
        check_render_mode(render_mode, [])
        self.config = make_serving_config(config_file, overrides)
        self.render_mode = render_mode
        self._queues = Queues(self.config, 1)
        self.observation_space = self._queues.observation_space
        self.action_space = self._queues.actions.space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Draw the requests of an episode; see the class for ``options``.

        Raises:
            TypeError: If ``options`` is not a dictionary.
            ValueError: If an option or its value is unknown.
        """
        super().reset(seed=seed)
        self._queues.reset(_ONE, [self.np_random], split_of(options, self.config.split))
        return self._queues.observe()[0], info_of_one(_no_infos(1))

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Run the next group at an operating point.

        Raises:
            ValueError: If there is no such point.
            gymnasium.error.ResetNeeded: If the episode is over.
        """
        if self._queues.over[0]:
            raise gym.error.ResetNeeded("the episode is over: call reset() before the next step()")
        infos, rewards = _served(self._queues, np.asarray(action)[None])
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
        check_num_envs(num_envs)
        check_render_mode(render_mode, [])
        self.config = make_serving_config(config_file, overrides)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self._queues = queues = Queues(self.config, num_envs)
        self.single_observation_space = queues.observation_space
        self.single_action_space = queues.actions.space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._randoms = [seeding.np_random()[0] for _ in range(num_envs)]
        self._split_name = self.config.split

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode in each queue. Raises: see ``ServingEnv.reset``."""
        self._split_name = split_of(options, self.config.split)
        seeds = [seed + env for env in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None and (not isinstance(seeds, Sequence | np.ndarray) or len(seeds) != self.num_envs):
            raise ValueError(f"expected a seed, or {self.num_envs} seeds, one per env; got {seed!r}")
        for env, of_env in enumerate(() if seeds is None else seeds):
            if of_env is not None:
                self._randoms[env] = seeding.np_random(int(of_env))[0]
        everyone = np.arange(self.num_envs)
        self._begin(everyone)
        return self._queues.observe(), infos_of_all(self.num_envs, (everyone, _no_infos(self.num_envs)))

    def step(self, actions: Any) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Run a group in each queue.

        Raises:
            ValueError: If the actions are malformed.
            gymnasium.error.ResetNeeded: If there was no reset.
        """
        queues, n = self._queues, self.num_envs
        if queues.over.any():
            raise gym.error.ResetNeeded("call reset() before the first step()")
        infos, rewards = _served(queues, actions)
        ended, observations = queues.over, queues.observe()
        over, going = np.flatnonzero(ended), np.flatnonzero(~ended)
        of_over, of_going = ({key: values[some] for key, values in infos.items()} for some in (over, going))
        shown = infos_of_all(n, (going, of_going), (over, _no_infos(len(over))))
        if len(over):
            shown |= final_infos(ended, list(observations), of_over)
            self._begin(over)
            observations = queues.observe()
        return observations, rewards, ended, np.zeros(n, dtype=np.bool_), shown

    def _begin(self, envs: Array) -> None:
        self._queues.reset(envs, [self._randoms[env] for env in envs], self._split_name)


def _served(queues: Queues, actions: Any) -> tuple[dict[str, Array], Array]:
    infos = queues.serve(queues.actions.decisions(actions, queues.n)[:, 0])
    rewards = -infos["refused"] - queues.config.penalty * infos["cost"]
    return infos | {"vector_reward": np.stack([infos["answers"], -infos["cost"]], axis=1)}, rewards


def _no_infos(n: int) -> dict[str, Array]:
    counts = {key: np.zeros(n, dtype=np.int64) for key in ("answers", "refused", "point")}
    sums = {key: np.zeros(n) for key in ("quality", "quality_ref", "cost", "flops_ratio", "seconds")}
    return counts | sums | {"vector_reward": np.zeros((n, 2))}
