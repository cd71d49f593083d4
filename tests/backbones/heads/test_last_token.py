"""Decoder-only models that classify by the state of an input's last token."""

from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch
from tokenizers import processors

from sd_gym.backbones.heads import LabelHead
from sd_gym.backbones.load import load_model, save_backbone
from sd_gym.switch import Switchboard
from tests.conftest import DECODER, make_inputs, make_last_token_classifier


@pytest.mark.parametrize("name", DECODER)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("drops", [False, True])
def test_a_mixed_batch_is_each_row_alone_on_either_side(name, side, drops):
    model, inputs = make_last_token_classifier(name), make_inputs(name, side=side)
    model.config.pad_token_id = 1
    board, random, present = Switchboard(model), np.random.default_rng(0), inputs["attention_mask"].bool()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    skip, keep = random.random((5, len(board))) < 0.5, random.random(present.shape) < 0.6
    last = [int(row.nonzero().max()) for row in present]
    keep[range(5), last] = True
    keep = keep if drops else None
    with torch.inference_mode(), board.decide(skip, keep):
        together = model(**inputs).logits
    assert len(together.unique(dim=0)) == 5
    for row, there in enumerate(present):
        alone = {key: value[row : row + 1, there] if key != "use_cache" else value for key, value in inputs.items()}
        with torch.inference_mode(), board.decide(skip[[row]], keep[[row]][:, there.numpy()] if drops else None):
            torch.testing.assert_close(model(**alone).logits[0], together[row], rtol=1e-4, atol=1e-4)


@pytest.fixture
def causal(tmp_path, tiny_tokenizer):
    """A folder of a Llama that classifies, whose tokenizer adds nothing at the end."""
    make_last_token_classifier("llama").save_pretrained(tmp_path / "causal")
    template = tiny_tokenizer.backend_tokenizer.post_processor
    try:
        tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
        tiny_tokenizer.save_pretrained(tmp_path / "causal")
    finally:
        tiny_tokenizer.backend_tokenizer.post_processor = template
    return str(tmp_path / "causal")


def test_the_token_that_is_pooled_is_never_dropped(causal, reviews):
    settings = {"dataset": str(reviews), "backbone": causal, "token_shares": [0.0, 0.9], "policy_rows": "all"}
    core = gym.make("SD/Classification-Custom-v0", **settings).unwrapped.core
    split = core.split("train")
    rows = np.arange(len(split))
    keep = split.tokens.kept(rows, np.ones_like(rows))
    assert keep[rows, split.encoded.source_length[rows] - 1].all()
    assert (keep.sum(axis=1) < split.encoded.source_length[rows]).all()


def test_stages_are_in_front_of_its_layers(causal, reviews):
    settings = {"dataset": str(reviews), "backbone": causal, "policy_rows": "all"}
    env = gym.make("SD/Classification-Custom-v0", stages=["first", "middle"], **settings).unwrapped
    assert env.core.stages == ["first", "decoder.1"]
    first, _ = env.reset(seed=0)
    after, *_ = env.step(np.zeros_like(env.action_space.sample()))
    assert not np.array_equal(first[3:], after[3:])
    assert len({*map(tuple, (env.reset(seed=seed)[0] for seed in range(9)))}) > 1  # texts look different


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs sd-gym[gguf]")
def test_a_gguf_file_gets_a_head_and_is_saved_as_any_other(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    torch.manual_seed(0)
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), head=LabelHead, num_labels=3)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    save_backbone(model, tokenizer, tmp_path / "saved")
    again, _ = load_model(str(tmp_path / "saved"))
    inputs = tokenizer(["abc", "d"], return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = model(**inputs).logits
        assert logits.shape == (2, 3)
        assert torch.equal(again(**inputs).logits, logits)


def write_gguf(file):
    """A random Llama of one layer that knows letters, as llama.cpp stores it; it has nothing to pad with."""
    from gguf import GGUFWriter

    tokens, random = ["<|endoftext|>", "<s>", "</s>", *"abcdefgh", "ab"], np.random.default_rng(0)
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    layer = {"attn_norm": [16], "ffn_norm": [16], "attn_q": [16, 16], "attn_k": [8, 16], "attn_v": [8, 16]}
    layer |= {"attn_output": [16, 16], "ffn_gate": [24, 16], "ffn_up": [24, 16], "ffn_down": [16, 24]}
    shapes = {"token_embd": [len(tokens), 16], "output_norm": [16], **{f"blk.0.{k}": v for k, v in layer.items()}}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
