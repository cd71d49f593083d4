"""The decision network, what it observes, and both as one artefact (``sd_gym.policy.artefact``)."""

<<<<<<< HEAD
from sd_gym.policy.network import HIDDEN, NETWORKS, DecisionPolicy, bounded, own_network, register_network

__all__ = ["HIDDEN", "NETWORKS", "DecisionPolicy", "bounded", "own_network", "register_network"]
=======
from sd_gym.policy.network import (
    HIDDEN,
    NETWORKS,
    DecisionPolicy,
    bounded,
    own_network,
    register_network,
)

__all__ = [
    "HIDDEN",
    "NETWORKS",
    "DecisionPolicy",
    "bounded",
    "own_network",
    "register_network",
]
>>>>>>> e688b5f (What config.json and result.json say of a run is checked when it is read, once for all who read it)
