"""What a network costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sd_gym.policy.networks import counted_flops, hidden_layers
from tests.policy.conftest import policy_of

STAGED = {"stages": ["first", "encoder.1", "answer"]}


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"blind": True},
        {"hidden": 24, "nvec": [2, 1, 5]},
        {"channels": 6},
        STAGED,
        {**STAGED, "per_stage": True},
        {**STAGED, "per_stage": True, "channels": 6, "token_width": 9},
    ],
)
def test_flops_are_counted_flops(layout, monkeypatch):
    """Of the layers: those of token encoders count per token."""
    policy, _ = policy_of(0, **layout)
    features = torch.eye(len(policy.stages), policy.features)  # a decision at each stage
    with FlopCounterMode(display=False) as counter:
        policy.head(policy.body(features))
    monkeypatch.setattr("sd_gym.policy.network.counted_flops", pytest.fail)  # it takes milliseconds per policy
    assert policy.flops == counter.get_total_flops() > 0


def test_flops_are_counted_in_inference_mode_too():
    with torch.inference_mode():
        assert counted_flops(hidden_layers(4, 64), 3, 4)[0] == 2 * 3 * (4 * 64 + 64 * 64)
