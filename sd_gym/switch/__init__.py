"""Switching a backbone: architectures, switches, the switchboard, FLOPs. Knows no task and no RL."""

from sd_gym.switch.architectures import (
    Architecture,
    Stack,
    Sublayer,
    UnsupportedArchitectureError,
    register_architecture,
    supported_architectures,
)
from sd_gym.switch.flops import FlopsModel
from sd_gym.switch.switchboard import Switch, Switchboard
from sd_gym.switch.tokens import inverse_document_frequency, keep_tokens, position_scores, random_scores

__all__ = [
    "Architecture",
    "FlopsModel",
    "Stack",
    "Sublayer",
    "Switch",
    "Switchboard",
    "UnsupportedArchitectureError",
    "inverse_document_frequency",
    "keep_tokens",
    "position_scores",
    "random_scores",
    "register_architecture",
    "supported_architectures",
]
