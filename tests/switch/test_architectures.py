"""Which models can be switched."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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
    ],
)
def test_a_class_that_lacks_a_stack_is_refused(model_class, config, message):
    with pytest.raises(UnsupportedArchitectureError, match=message):
        Switchboard(model_class(config))


@torch.inference_mode()
def test_a_bert_that_decodes_sees_no_later_token_when_some_are_dropped():
    board = Switchboard(BertLMHeadModel(BertConfig(**TINY["bert"], is_decoder=True)).eval())
    keep = np.array([[1, 0, 1, 1, 1]])
    with board.decide(np.zeros((1, len(board)), dtype=np.int64), keep):
        one, other = (board.model(torch.tensor([[5, 6, 7, 8, last]])).logits[0] for last in (9, 10))
    assert torch.equal(one[:4], other[:4])
    assert not torch.equal(one[4], other[4])


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "gpt2"])
def test_a_cross_attention_without_a_switch_is_refused(name):
    for across in (False, True):
        config = AutoConfig.for_model(name, is_decoder=True, add_cross_attention=across, **TINY[name])
        model = AutoModelForCausalLM.from_config(config)
        if across:
            with pytest.raises(UnsupportedArchitectureError, match="has no switch; use a model without it"):
                Switchboard(model)
        else:
            Switchboard(model)
