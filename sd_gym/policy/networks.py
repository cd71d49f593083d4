"""Networks from observations to logits: built-in layers, networks that a user registers, and their FLOPs."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sd_gym.registry import Registry, check_function

NetworkFactory = Callable[[int, int], nn.Module]
NETWORKS: Registry[NetworkFactory] = Registry("network", {})


def register_network(name: str, factory: NetworkFactory) -> None:
    """Register a policy network; all learning agents then take the setting ``network=name``.

    Args:
        name: Name of the network.
        factory: Makes the module from ``(features, logits)``; for example its class. The module maps observations,
            float32 ``[n, features]``, to logits ``[n, logits]``, row by row. A bias is added to its logits, so that
            learning begins at ``initial_skip_rate``. Its FLOPs count. Only Stable-Baselines3 sets training mode.

    Raises:
        ValueError: If the name is empty.
        TypeError: If the factory is no function and no class.
    """
    check_function(f"the network {name!r}", factory)
    if isinstance(factory, nn.Module):
        raise TypeError(f"the network {name!r} must be made anew for each agent; pass its class, or a function")
    NETWORKS.register(name, factory)


def hidden_layers(features: int, hidden: int) -> nn.Sequential:
    """Two hidden layers, from ``[n, features]`` to ``[n, hidden]``."""
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())


class PerStageMLP(nn.Module):
    """Hidden layers per stage; observations ``[n, features]`` begin with the stage, one-hot."""

    def __init__(self, features: int, hidden: int, stages: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.of_stage = nn.ModuleList([hidden_layers(features, hidden) for _ in range(stages)])

    def forward(self, observations: Tensor) -> Tensor:
        """The output of the layers of each row's stage, ``[n, hidden]``."""
        stage = observations[:, : len(self.of_stage)].argmax(dim=1)
        output = observations.new_zeros(len(observations), self.hidden)
        for number, layers in enumerate(self.of_stage):
            rows = torch.nonzero(stage == number)[:, 0]
            if len(rows):
                output = output.index_copy(0, rows, layers(observations[rows]))
        return output


class Bias(nn.Module):
    """Adds a bias to ``size`` logits of a registered network; with a ``weight`` of 0 instead of 1, only the bias."""

    weight: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("weight", torch.ones(size))

    def forward(self, logits: Tensor) -> Tensor:
        """``[n, size]`` to ``[n, size]``."""
        return logits * self.weight + self.bias


def registered_network(name: str, observation_size: int, n_logits: int) -> tuple[nn.Module, Bias]:
    """A new registered network, and the bias that is added to its logits.

    Raises:
        ValueError: If no network has that name, or its shapes or types are wrong.
    """
    network = NETWORKS.find(name)(observation_size, n_logits)
    expected = (
        f"the network {name!r}: expected a module from observations [n, {observation_size}] to logits [n, {n_logits}]"
    )
    if not isinstance(network, nn.Module):
        raise ValueError(f"{expected}, got {type(network).__name__}")
    try:
        _, logits = counted_flops(network, 2, observation_size)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"{expected}, on any device (its FLOPs are counted on 'meta'): {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, n_logits):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{expected}; for 2 observations it returned {got}")
    return network, Bias(n_logits)


def counted_flops(module: nn.Module, rows: int, features: int) -> tuple[int, Any]:
    """FLOPs and output of a module for ``rows`` observations, without running it.

    It uses torch's device ``meta``, which has no fused kernels: the counter misses those of LSTMs and attention.
    """
    with torch.inference_mode(False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        copy = deepcopy(module).to("meta").eval()  # copied here, as the caller may be in inference mode
        output = copy(torch.zeros(rows, features, device="meta"))
    return counter.get_total_flops(), output
