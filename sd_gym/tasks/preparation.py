"""Preparing any backbone on a data set of its task (``sd-gym prepare``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd_gym.backbones.load import load_model, save_backbone
from sd_gym.backbones.prepare import prepare
from sd_gym.policy import write_json
from sd_gym.switch import Switchboard
from sd_gym.tasks.data import DataError, Source, load_split
from sd_gym.tasks.encoding import Encoded, encode
from sd_gym.tasks.instance import Instance
from sd_gym.tasks.metrics import likelihood, quality

REPORTED_RATES = (0.0, 0.2, 0.4, 0.6)
EVALUATION_BATCH = 64


def prepare_backbone(
    backbone: str,
    source: Source,
    task: str,
    output: Path,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    max_rate: float = 0.6,
    max_source_length: int = 128,
    max_target_length: int = 32,
    label_range: float = 1.0,
    train_size: int | None = None,
    validation_size: int | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[int, float, float], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune a backbone on a task so that it bears skipping, and save it with its tokenizer and a report.

    Args:
        backbone: Local folder or hub id of a supported model; for classification a head of the right size is put on it
            if it has none, for the other tasks it must generate.
        source: The data set; its train and validation splits are used.
        task: ``classification`` (or regression, where the labels are scores), ``question_answering`` or
            ``summarization``.
        output: Folder to write to; ``checkpoint/`` in it while the preparation runs.
        steps: Optimiser steps; each runs the batch densely and under random decisions.
        batch_size: Instances a step.
        learning_rate: Peak learning rate.
        max_rate: Highest skip rate that a row may draw.
        max_source_length: Longest input, in tokens.
        max_target_length: Longest target, in tokens.
        label_range: Difference of the highest and the lowest score.
        train_size: At most so many training instances; ``None``: all.
        validation_size: Likewise.
        resume: Whether to go on from the checkpoint in ``output``, if there is one.
        seed: Of a new head, the batches and the decisions.
        device: Where to run.
        on_step: As for ``sd_gym.backbones.prepare``.

    Returns:
        The report, also in ``preparation.json``: settings, and mean quality on the validation split by random skip
        rate, before and after: accuracy where it classifies, the likelihood of the reference where it generates.

    Raises:
        FileExistsError: If ``output`` holds a model.
        FileNotFoundError, DataError, UnsupportedArchitectureError: As loading raises.
        ValueError: If the backbone cannot do the task.
        FloatingPointError: If the loss is not finite.
    """
    if (output / "config.json").exists():
        raise FileExistsError(f"{output} holds a model; choose another --output")
    sizes = {"train": train_size, "validation": validation_size}
    instances = {name: load_split(source, task, name, size) for name, size in sizes.items()}
    torch.manual_seed(seed)
    if task == "classification":
        label2id = classes(instances["train"])
        model, tokenizer = load_model(backbone, num_labels=len(label2id))
        model.config.label2id = label2id
        model.config.id2label = {index: word for word, index in label2id.items()}
    else:
        label2id = None
        model, tokenizer = load_model(backbone)
        if not model.can_generate():
            raise ValueError(f"the backbone {backbone!r} does not generate text, which {task} needs")
        if not model.config.is_encoder_decoder:
            raise ValueError(f"the backbone {backbone!r} is decoder-only; preparing these is not possible yet")
    model.to(device)
    lengths = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    encoded = {
        name: encode(split, tokenizer, generates=model.can_generate(), label2id=label2id, **lengths)
        for name, split in instances.items()
    }
    board = Switchboard(model.eval())

    def measured() -> dict[str, float]:
        return {str(rate): mean_quality(board, encoded["validation"], rate, label_range) for rate in REPORTED_RATES}

    before = measured()
    prepare(
        board,
        _batches(encoded["train"], batch_size, seed, model.device),
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 10),
        max_rate=max_rate,
        seed=seed,
        checkpoint=output / "checkpoint.pt",
        resume=resume,
        on_step=on_step,
    )
    report = {
        "backbone": backbone,
        "source": asdict(source),
        "task": task,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_rate": max_rate,
        "seed": seed,
        "instances": {name: len(split) for name, split in instances.items()},
        "quality": {"before": before, "after": measured()},
    }
    board.remove()
    save_backbone(model, tokenizer, output)
    write_json(output / "preparation.json", report)
    (output / "checkpoint.pt").unlink(missing_ok=True)
    return report


def classes(instances: list[Instance]) -> dict[str, int]:
    """Class index of each label word, in the order of the words or indices; a single "score" for a regression.

    Raises:
        DataError: If there are fewer than two classes, or words and indices are mixed.
    """
    labels = {instance.target for instance in instances}
    if any(isinstance(label, float) and not label.is_integer() for label in labels):
        return {"score": 0}
    if len({type(label) for label in labels}) > 1:
        raise DataError("labels must be all class indices or all words, got both")
    if all(isinstance(label, int) for label in labels):
        labels = set(range(max(labels) + 1))
    if len(labels) < 2:
        raise DataError(f"expected at least two classes, got only {labels}")
    return {str(label): index for index, label in enumerate(sorted(labels))}


@torch.inference_mode()
def mean_quality(board: Switchboard, encoded: Encoded, skip_rate: float, label_range: float = 1.0) -> float:
    """Mean quality over a split with every row skipping each switch at random (0: dense).

    Accuracy, or the nearness of scores, where the backbone classifies; the likelihood of the reference where it
    generates.
    """
    generator = torch.Generator().manual_seed(0)
    generates = board.model.can_generate()
    order = np.argsort(encoded.source_length, kind="stable")
    total = 0.0
    for rows in np.split(order, range(EVALUATION_BATCH, len(order), EVALUATION_BATCH)):
        inputs = encoded.batch(rows, board.model.device)
        labels = inputs["labels"] if generates else inputs.pop("labels")
        skip = (torch.rand(len(rows), len(board), generator=generator) < skip_rate).long()
        with board.decide(skip):
            logits = board.model(**inputs, **({"use_cache": False} if generates else {})).logits
        score = likelihood if generates else quality
        total += float(score(logits, labels, label_range).sum())
    return total / len(order)


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
