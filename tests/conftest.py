"""Tiny backbones and data sets, made by the tests themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WORDS = ["good", "bad", "fine", "awful", "the", "food", "was", "not", "room"]


def bart_config(cls, attention):
    return cls(
        vocab_size=40,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=20,
        max_position_embeddings=32,
        init_std=0.3,
        attn_implementation=attention,
    )


def make_model(name, attention="sdpa"):
    torch.manual_seed(0)
    if name == "bart":
        model = BartForConditionalGeneration(bart_config(BartConfig, attention))
    elif name == "mbart":
        model = MBartForConditionalGeneration(bart_config(MBartConfig, attention))
    else:
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=24,
                max_position_embeddings=32,
                initializer_range=0.3,
                attn_implementation=attention,
            )
        )
    return model.eval()


def make_inputs(name, batch=5, source=7, target=4, seed=0):
    """Inputs with rows of different lengths (right-padded), and both lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 40, (batch, source), generator=generator)
    lengths = torch.randint(2, source + 1, (batch,), generator=generator)
    lengths[0] = source
    mask = (torch.arange(source) < lengths[:, None]).long()
    inputs = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
    if name != "bert":
        inputs["decoder_input_ids"] = torch.randint(4, 40, (batch, target), generator=generator)
        inputs["use_cache"] = False
    return inputs


@pytest.fixture(scope="session")
def tiny_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "[CLS]", "[SEP]", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=32
    )


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random BERT classifier with two classes, saved as a local folder."""
    folder = tmp_path_factory.mktemp("backbone")
    make_model("bert").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path) -> Path:
    """Forty labelled reviews in one JSONL file."""
    file = tmp_path / "reviews.jsonl"
    rows = []
    for number in range(40):
        label = number % 2
        word = ["bad", "good"][label]
        text = " ".join(["the", ["food", "room"][number % 3 % 2], "was", word] + ["fine"] * (number % 5))
        rows.append({"text": text, "label": label})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
