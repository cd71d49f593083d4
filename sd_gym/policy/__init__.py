"""The decision network, what it observes, and both as one artefact (``sd_gym.policy.artefact``)."""

from sd_gym.policy.batches import blinded
from sd_gym.policy.choices import bounded
from sd_gym.policy.layers import NETWORKS, PerStageMLP, own_network, register_network
from sd_gym.policy.network import HIDDEN, DecisionPolicy

__all__ = [
    "HIDDEN",
    "NETWORKS",
    "DecisionPolicy",
    "PerStageMLP",
    "blinded",
    "bounded",
    "own_network",
    "register_network",
]
