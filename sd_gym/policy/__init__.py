"""The decision network, and what it observes."""

from sd_gym.policy.network import (
    HIDDEN,
    NETWORKS,
    DecisionPolicy,
    as_json,
    bounded,
    own_network,
    register_network,
    write_json,
)

__all__ = [
    "HIDDEN",
    "NETWORKS",
    "DecisionPolicy",
    "as_json",
    "bounded",
    "own_network",
    "register_network",
    "write_json",
]
