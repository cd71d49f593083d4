"""What a network costs."""

import torch

from tests.policy.conftest import policy_of


def test_flops_are_counted_in_inference_mode_too():
    policy, _ = policy_of(0)
    with torch.inference_mode():
        assert policy.flops == 2 * (4 * 64 + 64 * 64 + 64 * 11)
