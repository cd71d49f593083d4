"""Switching a backbone: architectures, switches, the switchboard, FLOPs. Knows no task and no RL."""

from sd_gym.switch.architectures import (
    Architecture,
    Stack,
    Sublayer,
    Switch,
    UnsupportedArchitectureError,
    register_architecture,
    supported_architectures,
)
from sd_gym.switch.batching import passes
from sd_gym.switch.context import StaleBoardError
from sd_gym.switch.first_layer import attention_received, first_layer_input, pooled
from sd_gym.switch.flops import FlopsModel
from sd_gym.switch.stages import PassState
from sd_gym.switch.switchboard import Switchboard
from sd_gym.switch.tokens import (
    dropped_tokens,
    inverse_document_frequency,
    keep_tokens,
    position_scores,
    rarity_scores,
)

__all__ = [
    "Architecture",
    "FlopsModel",
    "PassState",
    "Stack",
    "StaleBoardError",
    "Sublayer",
    "Switch",
    "Switchboard",
    "UnsupportedArchitectureError",
    "attention_received",
    "dropped_tokens",
    "first_layer_input",
    "inverse_document_frequency",
    "keep_tokens",
    "passes",
    "pooled",
    "position_scores",
    "rarity_scores",
    "register_architecture",
    "supported_architectures",
]
