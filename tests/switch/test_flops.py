"""Analytic FLOPs are those that a counter counts."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from sd_gym.switch import FlopsModel, Switchboard
from tests.conftest import ENCODER_DECODER, TINY, make_inputs, make_model
from tests.switch.conftest import quantised, random_decisions


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(TINY)),
    seed=st.integers(0, 10_000),
    source=st.integers(2, 20),
    target=st.integers(1, 12),
    drop=st.booleans(),
)
def test_analytic_flops_are_counted_flops(name, seed, source, target, drop):
    model = make_model(name, "eager")
    inputs = make_inputs(name, batch=1, source=source, target=target, seed=seed)
    board = Switchboard(model)
    skip, keep = random_decisions(board, 1, source, seed)
    keep = keep if drop else np.ones_like(keep)
    with torch.inference_mode(), board.decide(skip, keep), FlopCounterMode(display=False) as counter:
        model(**inputs)
    target_length = np.array([target]) if name in ENCODER_DECODER else None
    always, switched = FlopsModel(board).costs(np.array([source]), target_length, keep.sum(axis=1))
    assert counter.get_total_flops() == always[0] + (switched[0] * ~skip[0]).sum()


HEADS = (
    "BertForPreTraining BertForNextSentencePrediction BertForTokenClassification BertForMultipleChoice "
    "RobertaForMultipleChoice RobertaForSequenceClassification RobertaForMaskedLM DistilBertForTokenClassification "
    "ElectraForPreTraining ElectraForMultipleChoice ElectraForMaskedLM LlamaForTokenClassification "
    "GPT2ForTokenClassification"
).split()


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_is_counted(kind):
    model_class = getattr(transformers, kind)
    config = model_class.config_class(vocab_size=40, pad_token_id=1, **TINY[model_class.config_class.model_type])
    model = model_class._from_config(config, attn_implementation="eager").eval()
    ids = torch.full((2, 6), 5)  # two choices
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(ids[None] if "Choice" in kind else ids)
    always, switched = FlopsModel(Switchboard(model)).costs(np.array([6, 6]))
    assert counter.get_total_flops() == always.sum() + switched.sum()


class _Adapted(nn.Module):
    """A linear layer with an adapter, as PEFT wraps it."""

    def __init__(self, linear, width, output):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = linear, width, output
        self.lora_A, self.lora_B = (
            nn.ModuleDict({"default": nn.Linear(*widths, bias=False)}) for widths in ((width, 2), (2, output))
        )

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, hidden):
        return self.base_layer(hidden) + self.lora_B["default"](self.lora_A["default"](hidden))


@pytest.mark.parametrize("name", ["bert", "bart", "t5", "gpt2", "llama"])
def test_adapters_are_counted(name):
    model, inputs = make_model(name, "eager"), make_inputs(name, batch=1)
    inner = model.base_model.get_submodule("h" if name == "gpt2" else "layers" if name == "llama" else "encoder")
    for stack in (inner, model.base_model.get_submodule("decoder") if name in ENCODER_DECODER else nn.Module()):
        for path, linear in list(stack.named_modules()):
            if isinstance(linear, nn.Linear | Conv1D):
                shape = linear.weight.shape if isinstance(linear, Conv1D) else linear.weight.shape[::-1]
                parent, _, last = path.rpartition(".")
                setattr(stack.get_submodule(parent), last, _Adapted(linear, *shape))
    board = Switchboard(model)
    skip, _ = random_decisions(board, 1, 7, 0)
    with torch.inference_mode(), board.decide(skip), FlopCounterMode(display=False) as counter:
        model(**inputs)
    always, switched = FlopsModel(board).costs(np.array([7]), np.array([4]) if name in ENCODER_DECODER else None)
    assert counter.get_total_flops() == always[0] + (switched[0] * ~skip[0]).sum()


@pytest.mark.parametrize("name", ["bert", "mbart", "llama"])
def test_a_quantised_model_counts_as_the_model_that_it_was(name):
    model, lengths = make_model(name), (np.array([5, 9]), np.array([3, 4]))
    counted = [FlopsModel(Switchboard(each)).costs(*lengths) for each in (model, quantised(model))]
    for one, other in zip(*counted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_runs_for_each_beam(name):
    model, inputs = make_model(name, "eager"), make_inputs(name, batch=1)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        encoded = model.get_encoder()(inputs["input_ids"]).last_hidden_state.repeat(3, 1, 1)
        model(encoder_outputs=(encoded,), decoder_input_ids=inputs["decoder_input_ids"].repeat(3, 1), use_cache=False)
    always, switched = FlopsModel(Switchboard(model)).costs(np.array([7]), np.array([4]), beams=3)
    assert counter.get_total_flops() == always[0] + switched[0].sum()
