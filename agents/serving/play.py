"""Many dials play on the same requests at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from sd_gym.envs.serving.config import ServingConfig
from sd_gym.envs.serving.dial import Network
from sd_gym.envs.serving.queues import Queues

Array = NDArray
# Seeds of the arrivals for search, selection and test; all agents use the same.
FIRST_SEED = {"train": 1_000_000, "validation": 2_000_000, "test": 3_000_000}


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
        """Share of each operating point in the answers of all episodes, ``[dials, points]``."""
        answers = self.answers.sum(axis=1)
        return answers / np.maximum(answers.sum(axis=1, keepdims=True), 1)


def play(config: ServingConfig, networks: Sequence[Network], split: str, episodes: int) -> Played:
    """Play each network for ``episodes`` episodes; all networks get the same requests."""
    seeds = FIRST_SEED[split] + np.arange(episodes)
    stacked, shape = Network.stacked(networks), (len(networks), episodes)
    queues, random = Queues(config, len(networks) * episodes), np.random.default_rng(0)
    randoms = [seeding.np_random(int(seed))[0] for _ in networks for seed in seeds]
    queues.reset(np.arange(queues.n), randoms, split)
    answers, refused = np.zeros((queues.n, len(config.points))), np.zeros(queues.n)
    while not queues.over.all():
        points = stacked.choose(queues.observe().reshape(*shape, -1), random).ravel()
        infos = queues.serve(points)
        answers[np.arange(queues.n), points] += infos["answers"]
        refused += infos["refused"]
    return Played(answers.reshape(*shape, -1), refused.reshape(shape))
