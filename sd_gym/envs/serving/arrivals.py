"""When requests arrive: seeded point processes of a mean rate."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray as Array

Arrivals = Literal["poisson", "bursts", "day"]
BURST_LOADS = 1.2, 5.0  # bounds of the uniform distribution of a burst's rate over the mean rate
BURST_SHARE = 0.2  # of the time
BURST_REQUESTS = 2000  # mean number in a burst
DAY_SWING = 0.8  # amplitude of a day's curve over the mean rate
HOURS = 240  # pieces of a day's curve


def arrival_times(kind: Arrivals, rate: float, requests: int, random: np.random.Generator) -> Array:
    """Arrival times in seconds, float64 ``[requests]``, ascending and above 0.

    ``poisson`` has a constant rate. ``bursts`` switches between a calm and a high rate after exponential times (a
    Markov-modulated Poisson process; Fischer and Meier-Hellstern 1993, Performance Evaluation 18). ``day`` follows one
    period of a sine, from the mean over the peak to the trough. The mean rate of all is ``rate`` per second.
    The times of a process of rate 1 are mapped by the inverse of the expected count.
    """
    counts = random.exponential(size=requests).cumsum()
    if kind == "poisson":
        return counts / rate
    lengths, rates = _day(rate, requests) if kind == "day" else _bursts(rate, counts[-1], random)
    expected = np.append(0.0, (lengths * rates).cumsum())
    last = expected[-1]  # when all pieces are over, the rest arrives at the mean rate
    return np.interp(counts, expected, np.append(0.0, lengths.cumsum())) + np.maximum(counts - last, 0) / rate


def _day(rate: float, requests: int) -> tuple[Array, Array]:
    """Lengths in seconds and rates of the pieces of a day with an expected number of requests."""
    middle = (np.arange(HOURS) + 0.5) / HOURS
    return np.full(HOURS, requests / rate / HOURS), rate * (1 + DAY_SWING * np.sin(2 * np.pi * middle))


def _bursts(rate: float, count: float, random: np.random.Generator) -> tuple[Array, Array]:
    """Lengths and rates of alternating calm times and bursts, until ``count`` requests are expected."""
    high = sum(BURST_LOADS) / 2
    burst = BURST_REQUESTS / (high * rate)  # mean seconds
    calm_rate = rate * (1 - BURST_SHARE * high) / (1 - BURST_SHARE)
    means = np.array([burst * (1 - BURST_SHARE) / BURST_SHARE, burst])
    lengths, rates = np.empty((0, 2)), np.empty((0, 2))
    while (lengths[1:] * rates[1:]).sum() < count:
        heights = rate * random.uniform(*BURST_LOADS, size=16)
        lengths = np.concatenate([lengths, random.exponential(means, size=(16, 2))])
        rates = np.concatenate([rates, np.stack([np.full(16, calm_rate), heights], axis=1)])
    first = int(random.random() < BURST_SHARE)  # it may start with a burst
    return lengths.ravel()[first:], rates.ravel()[first:]
