"""A dial chooses the operating point of the next group from features of the queue. It needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray as Array

from sd_gym.config import validated
from sd_gym.envs.serving.config import ServingConfig
from sd_gym.envs.serving.queues import FEATURES, features, updated_loss
from sd_gym.files import map_arrays, read_json, write_arrays, write_json
from sd_gym.folders import MARKER
from sd_gym.version import __version__

WEIGHTS, DIAL = "dial.safetensors", "dial.json"


class Network:
    """A network with tanh layers that scores the operating points. It chooses the point with the highest score.

    ``layers`` are weights ``[in, out]`` and biases ``[out]``; stacked networks have an additional first axis. With
    ``draws``, the softmax of the scores is the distribution that a point is drawn from.
    """

    def __init__(self, layers: Sequence[tuple[Array, Array]], draws: bool = False) -> None:
        self.layers = list(layers)
        self.draws = draws

    def choose(self, observed: Array, random: np.random.Generator) -> Array:
        """Points, int64 ``[..., n]``, from features, float ``[..., n, 4]``."""
        values = observed
        for weight, bias in self.layers[:-1]:
            values = np.tanh(values @ weight + bias[..., None, :])
        weight, bias = self.layers[-1]
        scores = values @ weight + bias[..., None, :]
        return (scores + random.gumbel(size=scores.shape) if self.draws else scores).argmax(axis=-1)

    @staticmethod
    def stacked(networks: Sequence[Network]) -> Network:
        """Stack networks of the same shape."""
        of_layers = zip(*(network.layers for network in networks), strict=True)
        pairs = [[np.stack(parts) for parts in zip(*of_layer, strict=True)] for of_layer in of_layers]
        return Network([(weight, bias) for weight, bias in pairs], networks[0].draws)


class Dial:
    """Chooses the operating point of each group of a real server, in ``sd-gym serve --dial RUN``.

    Its features are ratios to the deadline and to what dense answers within it. So the env of the training should have
    the deadline and the service times of the server.

    Args:
        config: Configuration of the env.
        expected_loss: Mean loss of each operating point on policy rows, ``[points]``.
        network: Scores the points.

    Raises:
        ValueError: If the shapes of the network do not fit the env, or a number is not finite.
    """

    def __init__(self, config: ServingConfig, expected_loss: Array, network: Network) -> None:
        sizes = [len(FEATURES), *(bias.shape[-1] for _, bias in network.layers)]
        shapes = [weight.shape for weight, _ in network.layers]
        if shapes != list(pairwise(sizes)) or {sizes[-1], len(expected_loss)} != {len(config.points)}:
            raise ValueError(f"expected layers from {len(FEATURES)} to {len(config.points)} numbers, got {shapes}")
        if not all(np.isfinite(values).all() for values in chain(*network.layers, [expected_loss])):
            raise ValueError("expected finite weights and losses")
        self.config = config
        self.expected_loss = expected_loss
        self.network = network
        self._recent_loss = 0.0
        self._random = np.random.default_rng(0)

    @classmethod
    def load(cls, folder: str | Path) -> Dial:
        """Load the dial of a run. Raises ``FileNotFoundError`` if it has none, ``ValueError`` if it is damaged."""
        file = Path(folder) / DIAL
        if not file.is_file():
            raise FileNotFoundError(f"no {DIAL} in {folder}; expected a run of sd-gym train on a serving env")
        described, arrays = read_json(file), map_arrays(Path(folder) / WEIGHTS)
        try:
            config = validated(ServingConfig, described["env"], str(file))
            if missing := ServingConfig.model_fields.keys() - config.model_fields_set:
                raise ValueError(f"env: no {', '.join(sorted(missing))}")
            pairs = range(len(arrays) // 2)
            layers = [(np.array(arrays[f"{n}.weight"]), np.array(arrays[f"{n}.bias"])) for n in pairs]
            expected = np.array(described["expected_loss"], dtype=np.float64)
            return cls(config, expected, Network(layers, draws=described["draws"] is True))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{file}, or {WEIGHTS} beside it, is damaged ({error}); copy them again") from error

    def save(self, folder: Path) -> None:
        """Write ``dial.json`` and ``dial.safetensors``, which contain no code."""
        described = {MARKER: __version__, "env": self.config.model_dump(), "draws": self.network.draws}
        write_json(folder / DIAL, described | {"expected_loss": self.expected_loss.tolist()})
        arrays = {}
        for n, (weight, bias) in enumerate(self.network.layers):
            arrays |= {f"{n}.weight": weight, f"{n}.bias": bias}
        write_arrays(folder / WEIGHTS, arrays)

    def choose(self, queue_length: int, oldest_wait: float, arrival_rate: float) -> int:
        """The operating point of the next group, an index of ``config.points``: 0 is dense, later ones skip more.

        Args:
            queue_length: Number of waiting requests, including those of the group.
            oldest_wait: Seconds that the oldest of them has waited.
            arrival_rate: Requests per second within the last ``config.deadline`` seconds.
        """
        values = (np.array([float(value)]) for value in (queue_length, oldest_wait, arrival_rate, self._recent_loss))
        observed = features(self.config, *values)
        return int(self.network.choose(np.nan_to_num(observed), self._random)[0])

    def answered(self, point: int, rows: int) -> None:
        """Count ``rows`` more rows, answered at a ``point`` that the dial chose, in the recent loss."""
        self._recent_loss = float(updated_loss(self._recent_loss, self.expected_loss[point], rows))
