"""Which models can be switched."""

import pytest
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5EncoderModel,
)

from sd_gym.switch import Switchboard, UnsupportedArchitectureError
from tests.conftest import TINY


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    model = BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedArchitectureError, match=r"'bloom'.*bart, bert, distilbert.*register_architecture"):
        Switchboard(model)


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (T5EncoderModel, T5Config(**TINY["t5"]), "T5EncoderModel has no 'decoder.block', the decoder of a t5; use a"),
        (BartForCausalLM, BartConfig(**TINY["bart"]), "BartForCausalLM has no 'encoder.layers', the encoder of a bart"),
        (BertLMHeadModel, BertConfig(**TINY["bert"], is_decoder=True), "is_decoder=True.*bert is switched as an enc"),
    ],
)
def test_a_class_that_lacks_a_stack_or_decodes_with_an_encoder_is_refused(model_class, config, message):
    with pytest.raises(UnsupportedArchitectureError, match=message):
        Switchboard(model_class(config))
