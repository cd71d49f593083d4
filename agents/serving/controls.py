"""Baselines of a learned dial (fixed points, thresholds on the queue, a bound), and how dials are played."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray as Array
from scipy.optimize import linprog
from scipy.sparse import csr_array, diags_array, eye_array, hstack, kron, vstack
from sd_gym.agents.serving.learn import OnProgress

from sd_gym.envs.serving.arrivals import arrival_times
from sd_gym.envs.serving.config import ServingConfig
from sd_gym.envs.serving.dial import Network
from sd_gym.envs.serving.queues import FEATURES, Queues, expected_loss

NEVER = -1e9  # score of a point that is never chosen
STEEP = 1e3  # slope of scores by the queue
THRESHOLDS = (0.05, 0.15, 0.3, 0.6, 1.0, 1.5, 2.0)  # waiting requests, over those that dense answers in a deadline
SPACINGS = (0.03, 0.1, 0.2, 0.4)  # between the thresholds of a staircase
MIXTURES = (0.25, 0.5, 0.75)
BINS = 4  # per deadline, in the linear programme of ``foresight``
# Seeds of the arrivals for search, selection and test; all agents use the same.
FIRST_SEED = {"train": 1_000_000, "validation": 2_000_000, "test": 3_000_000}


def fixed(config: ServingConfig) -> list[Network]:
    """Each operating point, and random mixtures of neighbours."""
    points, networks = len(config.points), []
    for first in range(points):
        networks.append(_linear(np.zeros(points), np.where(np.arange(points) == first, 0.0, NEVER), draws=True))
        for share in MIXTURES if first + 1 < points else ():
            odds = np.full(points, NEVER)
            odds[first : first + 2] = np.log([1 - share, share])
            networks.append(_linear(np.zeros(points), odds, draws=True))
    return networks


def threshold(config: ServingConfig) -> list[Network]:
    """One operating point below a threshold on the queue's length, and a bolder one above it."""
    networks = []
    for low, high in combinations(range(len(config.points)), 2):
        for length in THRESHOLDS:
            slopes, bias = np.zeros(len(config.points)), np.full(len(config.points), NEVER)
            slopes[high] = STEEP
            bias[low] = 0.0
            bias[high] = -STEEP * length
            networks.append(_linear(slopes, bias))
    return networks


def staircase(config: ServingConfig) -> list[Network]:
    """Evenly spaced thresholds, one for each operating point after the first or second."""
    points, networks = np.arange(len(config.points)), []
    for first in (0, 1):
        for length in THRESHOLDS:
            for spacing in SPACINGS:
                stairs = np.cumsum(np.where(points > first, length + spacing * (points - first - 1), 0.0))
                networks.append(_linear(STEEP * points, np.where(points < first, NEVER, -STEEP * stairs)))
    return networks


def _linear(slopes: Array, bias: Array, draws: bool = False) -> Network:
    """A network whose scores are linear in the length of the queue."""
    weight = np.zeros((len(FEATURES), len(slopes)))
    weight[FEATURES.index("queue")] = slopes
    return Network([(weight, bias)], draws)


class Played(NamedTuple):
    """Counts of answers and of refused requests."""

    answers: Array  # [dials, episodes, points]
    refused: Array  # [dials, episodes]

    @property
    def goodput(self) -> Array:
        """Share of the requests that were answered in time, ``[dials, episodes]``."""
        answered = self.answers.sum(axis=2)
        return answered / (answered + self.refused)

    @property
    def shares(self) -> Array:
        """Share of each operating point in the answers of all episodes, ``[dials, points]``; without answers, dense."""
        answers = self.answers.sum(axis=1)
        answers[~answers.any(axis=1), 0] = 1
        return answers / answers.sum(axis=1, keepdims=True)


def foresight(config: ServingConfig, split: str, episodes: int, losses: Array) -> Played:
    """Upper bounds of any dial's goodput at mean losses ``[dials]``, even if it knows all arrivals, as one episode.

    This is a linear programme over bins of a quarter of the deadline. Requests are a fluid, and groups are always full.
    A request may be served from the start of its bin to the end of the bin of its deadline. All of this favours the
    server, so no dial answers more requests at the same mean loss on policy rows. Losses on other rows may differ.
    """
    width = config.deadline / BINS
    batch = config.max_batch
    loss = expected_loss(config)
    times, origin = [], 0.0
    for seed in FIRST_SEED[split] + np.arange(episodes):  # episodes follow each other and share one limit
        random = seeding.np_random(int(seed))[0]
        times.append(origin + arrival_times(config.arrivals, config.load * config.capacity, config.requests, random))
        origin = times[-1][-1] + 2 * config.deadline
    arrivals = np.concatenate(times)
    ends = np.arange(1, int(origin / width) + 2) * width
    arrived = np.searchsorted(arrivals, ends).astype(float)
    due = np.searchsorted(arrivals, ends - config.deadline).astype(float)
    # The variables of each bin: requests served by each point, refused requests, and their sum up to its end.
    bins, points = len(ends), len(config.points)
    seconds = np.array([point.per_request + point.per_group / batch for point in config.points])
    total = eye_array(bins)
    each = kron(total, np.ones((1, points)))
    sums = hstack([-each, -total, total - diags_array(np.ones(bins - 1), offsets=-1)]).tocsr()
    busy = hstack([kron(total, seconds[None]), csr_array((bins, 2 * bins))])
    free = np.full(bins * (points + 1), np.inf)
    bounds = np.stack([np.concatenate([np.zeros_like(free), due]), np.concatenate([free, arrived])], axis=1)
    served = np.concatenate([np.ones(bins * points), np.zeros(2 * bins)])
    answers = []
    for most in losses:
        lost = csr_array(np.concatenate([np.tile(loss - most, bins), np.zeros(2 * bins)])[None])
        limits = {"A_ub": vstack([busy, lost]).tocsr(), "b_ub": np.append(np.full(bins, width), 0.0)}
        solved = linprog(-served, **limits, A_eq=sums, b_eq=np.zeros(bins), bounds=bounds, method="highs")
        answers.append(solved.x[: bins * points].reshape(bins, points).sum(axis=0))
    answered = np.stack(answers)[:, None]
    return Played(answered, (len(arrivals) - answered.sum(axis=2)).clip(min=0))


def play(
    config: ServingConfig,
    networks: Sequence[Network],
    split: str,
    episodes: int,
    on_progress: OnProgress | None = None,
) -> Played:
    """Play each network for ``episodes`` episodes; all networks get the same requests."""
    seeds = FIRST_SEED[split] + np.arange(episodes)
    stacked, shape = Network.stacked(networks), (len(networks), episodes)
    queues, random = Queues(config, len(networks) * episodes), np.random.default_rng(0)
    randoms = [seeding.np_random(int(seed))[0] for _ in networks for seed in seeds]
    queues.reset(np.arange(queues.n), randoms, split)
    answers = np.zeros((queues.n, len(config.points)))
    refused = np.zeros(queues.n)
    decided = 0
    while not queues.over.all():
        if on_progress is not None:
            decided += int(np.count_nonzero(~queues.over))
            on_progress(decided, {})
        points = stacked.choose(queues.observe().reshape(*shape, -1), random).ravel()
        infos = queues.serve(points)
        answers[np.arange(queues.n), points] += infos["answers"]
        refused += infos["refused"]
    return Played(answers.reshape(*shape, -1), refused.reshape(shape))
