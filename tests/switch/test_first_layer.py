"""What the first layer shows of an input."""

import pytest
import torch

from sd_gym.switch import Switchboard, attention_received
from tests.conftest import TINY, make_inputs, make_model


@pytest.mark.parametrize("name", list(TINY))
def test_attention_received_is_the_first_layers(name):
    model, inputs = make_model(name, "eager"), make_inputs(name)
    with torch.inference_mode():
        outputs = model(**inputs, output_attentions=True)
    attentions = outputs.encoder_attentions if "encoder_attentions" in outputs else outputs.attentions
    weights, present = attentions[0].mean(dim=1), inputs["attention_mask"].bool()
    fast = make_model(name, "sdpa")
    received = attention_received(Switchboard(fast), inputs)
    for row in range(5):
        torch.testing.assert_close(received[row], weights[row][present[row]].mean(dim=0), rtol=1e-4, atol=1e-5)
    assert fast.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in fast.modules())
