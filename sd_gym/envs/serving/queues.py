"""The core of the serving envs: it simulates many queues, each in front of its own server."""

from functools import lru_cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.config import ConfigError
from sd_gym.envs.actions import Actions
from sd_gym.envs.config import load_config
from sd_gym.envs.serving.arrivals import arrival_times
from sd_gym.envs.serving.config import ServingConfig
from sd_gym.envs.table import TableCore, table_core
from sd_gym.registration import config_of

AVERAGED_ANSWERS = 1000.0  # answers over which the recent loss is averaged
FEATURES = ("queue", "oldest_wait", "arrival_rate", "recent_loss")
BOUND = 10.0  # of each feature


class Outcomes(NamedTuple):
    """Outcomes of the operating points on the rows of a split, float64 ``[rows, points]`` each."""

    quality: Array
    flops_ratio: Array

    @property
    def cost(self) -> Array:
        """The lost quality, ``quality_ref - quality``."""
        return self.quality[:, :1] - self.quality


def core_of(config: ServingConfig) -> TableCore:
    """The core of the table. Raises ``FileNotFoundError`` if it is missing, ``ValueError`` if it is damaged."""
    return table_core(load_config(config_of("SD/Table-v0"), {"table": config.table}))


@lru_cache(maxsize=16)
def outcomes(config: ServingConfig, split: str) -> Outcomes:
    """The table's outcomes of the operating points.

    Raises ``ConfigError`` if the table lacks a mask, or the policy does not fit the table or its first point skips;
    ``FileNotFoundError`` or ``ValueError`` if the policy cannot be loaded.
    """
    if config.policy is not None:
        return _outcomes_of_policy(config, split)
    core = core_of(config)
    rows = core.split(split)
    try:
        masks = np.array([point.mask for point in config.points])  # raises if they differ in length
        masks = core.masks_of(core.from_masks(masks))
    except ValueError as error:
        raise ConfigError(f"config key 'points': a mask is not one of the table {config.table}: {error}") from error
    numbers = np.arange(len(rows))
    return Outcomes(rows.scoring.of_masks(numbers)[:, masks], rows.costs.of_masks(numbers)[:, masks])


def _outcomes_of_policy(config: ServingConfig, split: str) -> Outcomes:
    """Outcomes of a policy at its points' margins; FLOPs include the policy's own."""
    from sd_gym.policy.artefact import SkipPolicy

    policy = SkipPolicy.from_pretrained(config.policy or "")
    network = policy.learned
    core = table_core(load_config(config_of("SD/Table-v0"), {"table": config.table, "stages": network.stages}))
    has, needs = (network.nvec, network.switches), (core.nvec.tolist(), core.switch_names)
    if has != needs or network.observation_size != core.observation.shape[0]:
        raise ConfigError(f"config key 'policy': {config.policy} was not trained on the table {config.table}")
    of_split = core.split(split)
    rows, scored = np.arange(len(of_split)), []
    for point in config.points:
        decisions, state = core.rollout(of_split, rows, network.with_margin(point.margin or 0.0).decide)
        scored.append(core.score(of_split, rows, decisions, state))
    if (scored[0].flops_ratio != 1).any():
        raise ConfigError(
            "config key 'points': the first point skips; expected the margin of dense, the last of 'operating_points' "
            "in the policy's skip_policy.json"
        )
    own = network.flops + core.observing_flops(of_split, rows, blind=network.blind)
    own = own / of_split.costs.dense_flops(rows)
    quality = np.stack([outcome.quality for outcome in scored], axis=1)
    flops_ratio = np.stack([outcome.flops_ratio for outcome in scored], axis=1)
    return Outcomes(quality, flops_ratio + own[:, None])


@lru_cache(maxsize=16)
def expected_loss(config: ServingConfig) -> Array:
    """Mean loss of each operating point on policy rows, float64 ``[points]``; a server knows no other losses."""
    return outcomes(config, "train").cost.mean(axis=0)


def features(config: ServingConfig, queue: Array, wait: Array, rate: Array, loss: Array) -> Array:
    """Observations of queues, float32 ``[n, 4]``, in units that do not depend on the server.

    The arguments, per queue ``[n]``: the number of waiting requests, the seconds that the oldest has waited, the
    requests per second within the last ``deadline`` seconds, and the mean expected loss of recent answers.
    """
    load = queue / (config.capacity * config.deadline), wait / config.deadline, rate / config.capacity
    units = *load, loss / config.epsilon
    return np.stack(np.broadcast_arrays(*units), axis=-1).clip(-BOUND, BOUND).astype(np.float32)


def updated_loss(recent_loss: Any, loss: Any, answers: Any) -> Any:
    """The recent loss after ``answers`` more answers at a point of the expected loss ``loss``."""
    return recent_loss - np.expm1(-np.asarray(answers) / AVERAGED_ANSWERS) * (loss - recent_loss)


class Queues:
    """``n`` queues, each in front of its own server. Arrays are ``[n]`` unless stated otherwise.

    A free server takes the oldest requests, at most ``max_batch``. Requests that it cannot answer within their
    deadline are refused before they run. Actions do not change the random numbers, which are drawn at the reset.
    """

    def __init__(self, config: ServingConfig, n: int) -> None:
        self.config = config
        self.n = n
        points = len(config.points)
        self.actions = Actions(gym.spaces.Discrete(points), np.array([points]), f"one of {points} operating points")
        self.observation_space = gym.spaces.Box(-BOUND, BOUND, (len(FEATURES),), np.float32)
        self._a, self._b = (
            np.array([getattr(point, key) for point in config.points]) for key in ("per_request", "per_group")
        )
        self._expected = expected_loss(config)
        self._envs = np.arange(n)
        self._places = np.arange(config.max_batch)
        self._times = np.zeros((n, config.requests + 1))  # of arrivals, [n, requests + 1]; the last one is a sentinel
        self._rows = np.zeros((n, config.requests + config.max_batch), dtype=np.int64)
        self._first = self._envs * (config.requests + 1)
        self._span = 0.0  # seconds between the origins of two queues in ``_flat``
        self._flat = np.zeros(0)  # arrivals of all queues, ascending, so that one search is enough
        self.now = np.zeros(n)
        self.recent_loss = np.zeros(n)
        self.head = np.full(n, config.requests)  # the oldest waiting request
        self.waiting = np.zeros(n, dtype=np.int64)
        self._split = ""

    @property
    def over(self) -> Array:
        """Which queues have answered or refused all requests, bool."""
        return self.head >= self.config.requests

    def reset(self, envs: Array, randoms: list[np.random.Generator], split: str) -> None:
        """Start episodes of the queues ``envs [m]`` with requests of a split, each drawn by its own generator."""
        config, self._split = self.config, split
        rows = len(outcomes(config, split).quality)
        for env, random in zip(envs, randoms, strict=True):
            self._times[env, :-1] = arrival_times(
                config.arrivals, config.load * config.capacity, config.requests, random
            )
            self._times[env, -1] = self._times[env, -2] + 1
            self._rows[env, : config.requests] = random.integers(rows, size=config.requests)
        self._span = self._times[:, -1].max() + 1
        self._flat = (self._times + self._envs[:, None] * self._span).ravel()
        self.now[envs] = 0.0
        self.recent_loss[envs] = 0.0
        self.head[envs] = 0
        self._wait_for_requests()

    def observe(self) -> Array:
        """Features, float32 ``[n, 4]``; meaningless for queues whose episode is over."""
        recent = self.now - self.config.deadline
        arrived = self.head + self.waiting - self._before(np.maximum(recent, 0.0))
        oldest = self.now - self._times[self._envs, self.head]
        return features(self.config, self.waiting, oldest, arrived / self.config.deadline, self.recent_loss)

    def serve(self, points: Array) -> dict[str, Array]:
        """Run a group in each queue at operating points, int64; returns the infos of the step."""
        config = self.config
        before = self.head
        end = self.head + self.waiting
        a, b = self._a[points], self._b[points]
        size = self._refuse_late(end, a, b)
        group = np.take_along_axis(self._rows, self.head[:, None] + self._places, axis=1)
        runs = self._places < size[:, None]
        known, at = outcomes(config, self._split), points[:, None]
        quality, quality_ref = ((known.quality[group, of] * runs).sum(axis=1) for of in (at, 0))
        flops = (known.flops_ratio[group, at] * runs).sum(axis=1)
        refused = self.head - before
        seconds = np.where(size > 0, a * size + b, 0.0)
        self.now = self.now + seconds
        self.head = self.head + size
        self.recent_loss = updated_loss(self.recent_loss, self._expected[points], size)
        refused += self._wait_for_requests()
        return {
            "answers": size,
            "refused": refused,
            "quality": quality,
            "quality_ref": quality_ref,
            "cost": quality_ref - quality,
            "flops_ratio": flops / np.maximum(size, 1),
            "seconds": seconds,
            "point": points,
        }

    def _refuse_late(self, end: Array, a: Array, b: Array) -> Array:
        """Refuse the oldest requests before ``end`` that a group cannot answer in time; returns the group's size."""
        config = self.config
        while True:
            waiting = end - self.head
            size = np.minimum(waiting, config.max_batch)
            late = self._before(np.maximum(self.now + a * size + b - config.deadline, 0.0))
            # With one request less a small group is faster, so the others may be in time.
            most = self.head + np.maximum(waiting - config.max_batch, 0) + 1
            head = np.clip(late, self.head, np.minimum(most, end))
            if (head == self.head).all():
                return size
            self.head = head

    def _wait_for_requests(self) -> Array:
        """Refuse requests whose deadline has passed; where no request waits, advance to the next arrival."""
        requests = self.config.requests
        late = np.clip(self._before(np.maximum(self.now - self.config.deadline, 0.0)), self.head, requests)
        refused, self.head = late - self.head, late
        going = self.head < requests
        self.now = np.where(going, np.maximum(self.now, self._times[self._envs, self.head]), self.now)
        arrived = np.minimum(self._before(self.now), requests)
        self.waiting = np.where(going, arrived - self.head, 0)
        return refused

    def _before(self, times: Array) -> Array:
        times = np.minimum(times, self._times[:, -1])
        return np.searchsorted(self._flat, self._envs * self._span + times, side="right") - self._first
