"""Which models can be switched."""

import pytest
from transformers import BloomConfig, BloomForCausalLM

from sd_gym.switch import Switchboard, UnsupportedArchitectureError


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    model = BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedArchitectureError, match=r"'bloom'.*bart, bert, distilbert.*register_architecture"):
        Switchboard(model)
