"""What every head has."""

import numpy as np

from sd_gym.backbones.heads import flops_share


def test_a_share_of_no_flops_is_one():
    np.testing.assert_array_equal(flops_share(np.array([0, 1]), np.array([0, 4])), [1, 0.25])
