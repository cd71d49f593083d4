"""The decision network, its observations, and both as one artefact (``sd_gym.policy.artefact``)."""

from sd_gym.policy.choices import bounded
from sd_gym.policy.network import HIDDEN, DecisionPolicy
from sd_gym.policy.networks import NETWORKS, PerStageMLP, register_network, registered_network
from sd_gym.policy.observations import blinded

__all__ = [
    "HIDDEN",
    "NETWORKS",
    "DecisionPolicy",
    "PerStageMLP",
    "blinded",
    "bounded",
    "register_network",
    "registered_network",
]
