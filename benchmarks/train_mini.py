"""Trains the bundled backbone: one small pre-norm encoder-decoder for the three procedural tasks.

    python benchmarks/train_mini.py --output mini

First densely, with a curriculum (question answering starts with one hop; the next level opens when the last one is
learned), then under random decisions so that the backbone is robust to skipping (``sd_gym.backbones.prepare``). Writes
weights, configuration, tokenizer and the card.

The initial weights are structured, so that it begins with the ability to look facts up. From random weights a model
of this size and training time does not find out how to answer ``who pays finn ?``: the right subject is the token
whose *next two* tokens equal the *last two* tokens of the question, and nothing rewards half of that circuit. In the
spirit of mimetic initialisation (Trockman and Kolter 2023) it is laid out here:

* tokens and positions live in different halves of the embedding, and positions are nearly orthogonal sinusoids,
* the first encoder layer's heads look at the neighbours at -1, -2, +2 and +1 and copy them into four subspaces,
* one head of the second layer compares the two neighbours before a token with the two after every other token.

Everything is trained afterwards like any other weight.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import MBartConfig, MBartForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.mbart.modeling_mbart import MBartAttention

from sd_gym.backbones.draws import even, layers_of
from sd_gym.backbones.load import save_backbone
from sd_gym.backbones.prepare import Recipe, prepare
from sd_gym.data.instance import Instance
from sd_gym.switch import Switchboard
from sd_gym.tasks.procedural.generate import TASKS, generate_split, stream, vocabulary

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MAX_POSITIONS = 126  # + 2, mBART's offset
SHARES = (0.15, 0.55, 0.3)  # of the instances, of the tasks
TRAINING_WEIGHTS = (0.1, 0.15, 0.35, 0.4)  # of the levels: what is easy is soon learned
BRANCH_SCALE = 0.3  # of the output of every residual branch: keeps what the first two layers write readable
TOKEN_SCALE = (0.1, 1.4)  # of the token embeddings, in the half of the positions and in their own
POSITION_AMPLITUDE = 0.15
NEIGHBOUR_SHARPNESS = 0.17
GAIN = 3.0  # of what the first two layers write, over the embedding
NEIGHBOURS = (-1, -2, 2, 1)  # what each head of the first encoder layer looks at


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word level: splits at white space, one id a word, ``</s>`` at the end."""
    words = {word: index for index, word in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", words["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_POSITIONS,
    )


def make_model(seed: int) -> MBartForConditionalGeneration:
    """The untrained backbone: 6+6 layers of width 128, 2.0 million parameters."""
    torch.manual_seed(seed)
    model = MBartForConditionalGeneration(
        MBartConfig(
            vocab_size=len(SPECIAL) + len(vocabulary()),
            d_model=128,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            max_position_embeddings=MAX_POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            init_std=0.08,
            scale_embedding=False,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )
    lay_out_look_up(model)
    return model


@torch.no_grad()
def lay_out_look_up(model: MBartForConditionalGeneration) -> None:
    """Give the model the structured initial weights, in place."""
    width = model.config.d_model
    half, head = width // 2, width // model.config.encoder_attention_heads
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            parameter.mul_(BRANCH_SCALE)
    for module in model.modules():
        if isinstance(module, MBartAttention):
            module.k_proj.weight.copy_(module.q_proj.weight)  # equal tokens attend to each other
    _separate_tokens_and_positions(model, half)
    first, second = (layer.self_attn for layer in model.model.encoder.layers[:2])
    subspaces = _orthogonal(width, width)
    reads = {neighbour: subspaces[:, head * h : head * (h + 1)].T for h, neighbour in enumerate(NEIGHBOURS)}
    copies = {distance: _on_tokens(head, width) for distance in (1, 2)}
    for h, neighbour in enumerate(NEIGHBOURS):
        rows = slice(head * h, head * (h + 1))
        query = torch.zeros(head, width)
        query[:, :half] = torch.randn(head, half) * NEIGHBOUR_SHARPNESS
        first.q_proj.weight[rows] = query
        first.k_proj.weight[rows] = query @ _shift(-neighbour, width, half)
        # The object stands 1 before the question's end and 2 after the subject, the verb 2 before and 1 after.
        first.v_proj.weight[rows] = copies[1 if neighbour in (-1, 2) else 2]
        first.out_proj.weight[:, rows] = GAIN * subspaces[:, rows]
    rows = slice(0, head)
    mix_object, mix_verb = _orthogonal(head, head), _orthogonal(head, head)
    second.q_proj.weight[rows] = mix_object @ reads[-1] + mix_verb @ reads[-2]
    second.k_proj.weight[rows] = mix_object @ reads[2] + mix_verb @ reads[1]
    second.v_proj.weight[rows] = GAIN * _on_tokens(head, width)
    second.out_proj.weight[:, rows] = GAIN * _orthogonal(width, head)


def _separate_tokens_and_positions(model: MBartForConditionalGeneration, half: int) -> None:
    tokens = model.model.shared.weight
    tokens[:, :half] *= TOKEN_SCALE[0]
    tokens[:, half:] *= TOKEN_SCALE[1]
    for stack in (model.model.encoder, model.model.decoder):
        weight = stack.embed_positions.weight
        angles = torch.arange(weight.shape[0])[:, None] * _frequencies(half)
        weight.zero_()
        weight[:, 0:half:2] = POSITION_AMPLITUDE * torch.sin(angles)
        weight[:, 1:half:2] = POSITION_AMPLITUDE * torch.cos(angles)


def _frequencies(half: int) -> Tensor:
    """Evenly spaced over (0, pi), which makes different positions nearly orthogonal."""
    return math.pi * (torch.arange(half // 2) + 0.5) / (half // 2)


def _shift(distance: int, width: int, half: int) -> Tensor:
    """The linear map ``[width, width]`` from the embedding of position p to that of p + distance."""
    matrix = torch.zeros(width, width)
    sine, cosine = torch.arange(0, half, 2), torch.arange(1, half, 2)
    angle = _frequencies(half) * distance
    matrix[sine, sine] = matrix[cosine, cosine] = torch.cos(angle)
    matrix[sine, cosine] = torch.sin(angle)
    matrix[cosine, sine] = -torch.sin(angle)
    return matrix


def _on_tokens(rows: int, width: int) -> Tensor:
    """A random map ``[rows, width]`` that reads the tokens' half only and keeps their scale."""
    half = width // 2
    weight = torch.zeros(rows, width)
    weight[:, half:] = torch.randn(rows, half) / math.sqrt(half)
    return weight


def _orthogonal(size: int, columns: int) -> Tensor:
    """Random orthonormal columns ``[size, columns]``."""
    return torch.linalg.qr(torch.randn(size, size))[0][:, :columns]


def encode(tokenizer: PreTrainedTokenizerFast, instances: list[Instance]) -> dict[str, Tensor]:
    """Inputs and labels of a batch, padded; padding labels are -100."""
    inputs = tokenizer([i.source for i in instances], padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = tokenizer([i.target for i in instances], padding=True, return_tensors="pt")
    inputs["labels"] = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
    return dict(inputs)


class Curriculum:
    """An endless stream of training batches, whose question answering grows harder when ``raise_level`` is called."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, shares: tuple[float, ...], batch_size: int, seed: int
    ) -> None:
        self.level = 2
        self._shares = shares
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._seed = seed
        self._random = random.Random(seed)
        self._open()

    def raise_level(self) -> None:
        """Open the next level of question answering, with fresh instances."""
        self.level += 1
        self._seed += 1
        self._open()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of instances of similar length, so that little is spent on padding."""
        while True:
            tasks = self._random.choices(list(TASKS), self._shares, k=4 * self._batch_size)
            pool = sorted((next(self._streams[task]) for task in tasks), key=lambda i: len(i.source.split()))
            chunks = [pool[i : i + self._batch_size] for i in range(0, len(pool), self._batch_size)]
            self._random.shuffle(chunks)
            for chunk in chunks:
                yield encode(self._tokenizer, chunk)

    def _open(self) -> None:
        self._streams = {
            task: stream(
                task,
                "train",
                self._seed,
                max_level=self.level if task == "question_answering" else 4,
                weights=TRAINING_WEIGHTS,
                trace=0.3,
            )
            for task in TASKS
        }


@torch.inference_mode()
def exact_match(
    board: Switchboard,
    tokenizer: PreTrainedTokenizerFast,
    instances: list[Instance],
    max_rate: float = 0.0,
) -> dict[int, float]:
    """Share of exactly right targets by difficulty level, under random decisions if ``max_rate`` is positive."""
    was_training = board.model.training
    board.model.eval()
    generator = torch.Generator().manual_seed(0)
    hits: dict[int, list[bool]] = {}
    ordered = sorted(instances, key=lambda i: len(i.source.split()))
    for start in range(0, len(ordered), 100):
        chunk = ordered[start : start + 100]
        batch = encode(tokenizer, chunk)
        labels = batch["labels"]
        with board.decide(even(len(chunk), layers_of(board), max_rate, generator)):
            predicted = board.model(**batch).logits.argmax(-1)
        right = ((predicted == labels) | (labels == -100)).all(dim=1)
        for instance, hit in zip(chunk, right.tolist(), strict=True):
            hits.setdefault(instance.difficulty, []).append(hit)
    board.model.train(was_training)
    return {level: sum(values) / len(values) for level, values in sorted(hits.items())}


def main() -> None:
    """Train, evaluate and save; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the backbone to")
    parser.add_argument("--start", type=Path, help="folder of a backbone to go on from (its curriculum is done)")
    parser.add_argument(
        "--shares", type=float, nargs=3, default=SHARES, help=f"of the instances, of {', '.join(TASKS)}"
    )
    parser.add_argument("--steps", type=int, default=16000, help="optimiser steps in all")
    parser.add_argument("--dense-steps", type=int, default=10000, help="of them, dense steps at the start")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    tokenizer = make_tokenizer()
    model = make_model(arguments.seed)
    if arguments.start is not None:
        model = MBartForConditionalGeneration.from_pretrained(arguments.start, trust_remote_code=False)
    board = Switchboard(model)
    batches = Curriculum(tokenizer, arguments.shares, arguments.batch_size, arguments.seed)
    if arguments.start is not None:
        batches.raise_level()
        batches.raise_level()
    validation = {task: generate_split(task, "validation", 600) for task in TASKS}
    started = time.time()

    def on_step(step: int, figures: dict[str, float]) -> None:
        if step % 400:
            return
        dense = {task: exact_match(board, tokenizer, validation[task]) for task in TASKS}
        losses = f"loss {figures['loss']:.3f} {figures['distillation']:.3f}"
        print(f"step {step} {time.time() - started:.0f} s {losses} level {batches.level}")
        for task, by_level in dense.items():
            line = " ".join(f"{value:.3f}" for value in by_level.values())
            if step > arguments.dense_steps:
                skipped = exact_match(board, tokenizer, validation[task], 0.8)
                line += "  under decisions " + " ".join(f"{value:.3f}" for value in skipped.values())
            print(f"  {task:20} {line}", flush=True)
        if batches.level < 4 and dense["question_answering"][batches.level] > 0.9:
            batches.raise_level()
        save_backbone(model, tokenizer, arguments.output)

    recipe = Recipe(
        arguments.steps,
        arguments.learning_rate,
        max_rate=0.8,
        dense_steps=arguments.dense_steps,
        warmup_steps=200,
        seed=arguments.seed,
    )
    prepare(board, batches, recipe, on_step=on_step)
    save_backbone(model, tokenizer, arguments.output)
    test = {task: exact_match(board, tokenizer, generate_split(task, "test", 2000)) for task in TASKS}
    (arguments.output / "quality.json").write_text(json.dumps(test, indent=2))


if __name__ == "__main__":
    main()
