"""Preparing a sequence classifier on a classification data set (``sd-gym prepare``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd_gym.backbones.load import load_model, save_backbone
from sd_gym.backbones.prepare import prepare
from sd_gym.policy import write_json
from sd_gym.switch import Switchboard
from sd_gym.tasks.data import DataError, load_split
from sd_gym.tasks.encoding import Encoded, encode
from sd_gym.tasks.instance import Instance
from sd_gym.tasks.metrics import quality

REPORTED_RATES = (0.0, 0.2, 0.4, 0.6)
EVALUATION_BATCH = 64


def prepare_classifier(
    backbone: str,
    dataset: str,
    output: Path,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    max_rate: float = 0.6,
    max_length: int = 128,
    seed: int = 0,
    on_step: Callable[[int, float, float], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune a backbone as a classifier that bears skipping, and save it with its tokenizer and a report.

    Args:
        backbone: Local folder or hub id of a supported encoder; a classification head is put on it if it has none.
        dataset: As for ``sd_gym.tasks.data.load_split``; its train and validation splits are used.
        output: Folder to write to.
        steps: Optimiser steps; each runs the batch densely and under random decisions.
        batch_size: Instances a step.
        learning_rate: Peak learning rate.
        max_rate: Highest skip rate that a row may draw.
        max_length: Longest input, in tokens.
        seed: Of the new head, the batches and the decisions.
        on_step: As for ``sd_gym.backbones.prepare``.

    Returns:
        The report, also in ``preparation.json``: settings, and accuracy on validation by random skip rate.

    Raises:
        FileExistsError: If ``output`` holds a model.
        FileNotFoundError, DataError, UnsupportedArchitectureError: As loading raises.
        FloatingPointError: If the loss is not finite.
    """
    if (output / "config.json").exists():
        raise FileExistsError(f"{output} holds a model; choose another --output")
    instances = {name: load_split(dataset, "classification", name, None) for name in ("train", "validation")}
    label2id = classes(instances["train"])
    torch.manual_seed(seed)
    model, tokenizer = load_model(backbone, num_labels=len(label2id))
    model.config.label2id = label2id
    model.config.id2label = {index: word for word, index in label2id.items()}
    encoded = {
        name: encode(
            split,
            tokenizer,
            generates=False,
            max_source_length=max_length,
            max_target_length=1,
            label2id=label2id,
        )
        for name, split in instances.items()
    }
    board = Switchboard(model)
    prepare(
        board,
        _batches(encoded["train"], batch_size, seed, model.device),
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 10),
        max_rate=max_rate,
        seed=seed,
        on_step=on_step,
    )
    report = {
        "backbone": backbone,
        "dataset": dataset,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_rate": max_rate,
        "seed": seed,
        "instances": {name: len(split) for name, split in instances.items()},
        "accuracy": {str(rate): accuracy(board, encoded["validation"], rate) for rate in REPORTED_RATES},
    }
    board.remove()
    save_backbone(model, tokenizer, output)
    write_json(output / "preparation.json", report)
    return report


def classes(instances: list[Instance]) -> dict[str, int]:
    """Class index of each label word, in the order of the words or indices.

    Raises:
        DataError: If there are fewer than two classes, or words and indices are mixed.
    """
    labels = {instance.target for instance in instances}
    if len({type(label) for label in labels}) > 1:
        raise DataError("labels must be all class indices or all words, got both")
    if all(isinstance(label, int) for label in labels):
        labels = set(range(max(labels) + 1))
    if len(labels) < 2:
        raise DataError(f"expected at least two classes, got only {labels}")
    return {str(label): index for index, label in enumerate(sorted(labels))}


@torch.inference_mode()
def accuracy(board: Switchboard, encoded: Encoded, max_rate: float) -> float:
    """Accuracy over a split with every row skipping each switch at rate ``max_rate`` (0: dense)."""
    generator = torch.Generator().manual_seed(0)
    order = np.argsort(encoded.source_length, kind="stable")
    right = []
    for rows in np.split(order, range(EVALUATION_BATCH, len(order), EVALUATION_BATCH)):
        inputs = encoded.batch(rows, board.model.device)
        labels = inputs.pop("labels")
        skip = (torch.rand(len(rows), len(board), generator=generator) < max_rate).long()
        with board.decide(skip):
            right.append(quality(board.model(**inputs).logits, labels))
    return float(torch.cat(right).mean())


def _batches(encoded: Encoded, batch_size: int, seed: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches; within a window of 50 batches, instances of similar length go together."""
    random = np.random.default_rng(seed)
    window = 50 * batch_size
    while True:
        order = random.permutation(len(encoded))
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(encoded.source_length[part], kind="stable")]
            batches = np.split(part, range(batch_size, len(part), batch_size))
            for number in random.permutation(len(batches)):
                yield encoded.batch(batches[number], device)
