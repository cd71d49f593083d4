"""Makes a small generator with random weights where none can be downloaded, for ``sd-gym prepare`` to train.

    python benchmarks/generator.py --tokenizer MINILM --data DATA --output generator

``MINILM`` is the folder or hub id of a model with a WordPiece tokenizer. ``DATA`` holds ``train.jsonl`` with
``document`` and ``summary``. Of the vocabulary only the pieces that the training file needs remain, and the ASCII
characters. Otherwise the scores of 30,000 pieces, which nothing can skip, were most of a decoder's FLOPs. The model is
a Pegasus of four layers a stack: its norms come before its sublayers, so skipping one is an identity.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PegasusConfig, PegasusForConditionalGeneration, PreTrainedTokenizerFast

SPECIAL = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
WIDTH, LAYERS, HEADS, LONGEST = 192, 4, 4, 128


def texts_of(data: Path) -> list[str]:
    """All texts of the training file."""
    rows = [json.loads(line) for line in (data / "train.jsonl").open(encoding="utf-8")]
    return [row[key] for row in rows for key in ("document", "summary")]


def pruned(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer with the pieces that the texts need. WordPiece prefers long pieces, so it cuts them as before."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)), model_max_length=LONGEST, **names
    )


def main() -> None:
    """Read the command line, make the model and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or hub id with a WordPiece tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl: document and summary")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    whole = AutoTokenizer.from_pretrained(arguments.tokenizer, trust_remote_code=False)
    tokenizer = pruned(whole, texts_of(arguments.data))
    sizes = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 4 * WIDTH}
    of_stacks = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in sizes.items()}
    torch.manual_seed(0)
    model = PegasusForConditionalGeneration(
        PegasusConfig(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            activation_function="gelu",
            max_position_embeddings=LONGEST,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.sep_token_id,
            forced_eos_token_id=None,
            **of_stacks,
        )
    )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{len(tokenizer):,} of {len(whole):,} pieces, {model.num_parameters():,} weights: {arguments.output}")


if __name__ == "__main__":
    main()
