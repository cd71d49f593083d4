"""Preparing a backbone: fine-tuning it on its task so that it bears skipping.

A backbone that was only trained densely breaks when sublayers are skipped. Here every batch runs twice in one pass:
once densely, under the task's loss, and once under random decisions, with the dense output as the soft target (the
"sandwich" of slimmable networks, Yu et al. 2019; LayerDrop, Fan et al. 2020, is the ancestor).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sd_gym.switch import Switchboard


def random_decisions(rows: int, switches: int, max_rate: float, generator: torch.Generator) -> Tensor:
    """Random skip vectors: each row draws its own rate from ``[0, max_rate]``, then each switch by that rate.

    Returns:
        int64 ``[rows, switches]`` on the CPU.
    """
    rates = torch.rand(rows, 1, generator=generator) * max_rate
    return (torch.rand(rows, switches, generator=generator) < rates).long()


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of class labels ``[batch]`` or token labels ``[batch, length]`` (-100 counts not).

    Squared error where the labels are scores (floats).
    """
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0].float(), labels)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def distillation_loss(logits: Tensor, dense_logits: Tensor, labels: Tensor) -> Tensor:
    """Mean KL divergence from the dense output, over the same positions as ``task_loss``; no gradient to the dense.

    Squared distance where the labels are scores.
    """
    if labels.is_floating_point():
        return F.mse_loss(logits.float(), dense_logits.detach().float())
    counted = labels != -100
    target = F.log_softmax(dense_logits.detach()[counted], dim=-1)
    return F.kl_div(F.log_softmax(logits[counted], dim=-1), target, reduction="batchmean", log_target=True)


def sandwich_loss(board: Switchboard, batch: dict[str, Tensor], skip: Tensor) -> tuple[Tensor, Tensor]:
    """The task loss of the dense half and the distillation loss of the half under ``skip``, from one forward pass.

    Args:
        board: The backbone's switchboard.
        batch: The model's inputs with ``labels``, each ``[batch, ...]``.
        skip: Decisions of the switched half, ``[batch, switches]``.
    """
    doubled = {key: torch.cat([value, value]) for key, value in batch.items()}
    with board.decide(torch.cat([torch.zeros_like(skip), skip])):
        dense, switched = board.model(**doubled).logits.chunk(2)
    return task_loss(dense, batch["labels"]), distillation_loss(switched, dense, batch["labels"])


def prepare(
    board: Switchboard,
    batches: Iterable[dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    dense_steps: int = 0,
    warmup_steps: int = 100,
    max_rate: float = 0.8,
    weight_decay: float = 0.01,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, float, float], None] | None = None,
) -> None:
    """Fine-tune the backbone of ``board`` in place; learning rate warmed up, then a cosine down to zero.

    Args:
        board: The backbone's switchboard.
        batches: Yields at least ``steps`` batches of the model's inputs with ``labels``, on the model's device.
        steps: Optimiser steps in all.
        learning_rate: Peak learning rate of AdamW.
        dense_steps: The first steps run densely only (a backbone that starts from nothing must learn first).
        warmup_steps: Steps of the linear warm-up.
        max_rate: Highest skip rate that a row may draw.
        weight_decay: Of AdamW.
        seed: Of the random decisions.
        checkpoint: File that the state is written to ten times on the way; ``None``: none.
        resume: Whether to go on from it, if it is there, as if nothing had happened: the batches that were used are
            drawn again and passed over.
        on_step: Called with (step, task loss, distillation loss) after every step.

    Raises:
        ValueError: If the batches end early.
        FloatingPointError: If the loss is not finite.
    """
    model = board.model
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
    )

    def scale(step: int) -> float:
        progress = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
        return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = _restore(checkpoint, state, generator) if resume and checkpoint is not None and checkpoint.exists() else 0
    source = iter(batches)
    for step in range(1, steps + 1):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step - 1} of {steps} steps")
        if step <= done:
            continue
        if step <= dense_steps:
            loss = task_loss(model(**batch).logits, batch["labels"])
            distillation = torch.zeros(())
        else:
            skip = random_decisions(len(batch["labels"]), len(board), max_rate, generator)
            loss, distillation = sandwich_loss(board, batch, skip)
        total = loss + distillation
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not math.isfinite(total.item()):
            raise FloatingPointError(f"the loss is {total.item()} at step {step}; try a lower learning rate")
        if on_step is not None:
            on_step(step, loss.item(), distillation.item())
        if checkpoint is not None and step % max(1, steps // 10) == 0:
            _save(checkpoint, state, generator, step)
    model.eval()


def _save(file: Path, state: dict[str, Any], generator: torch.Generator, step: int) -> None:
    """Everything that the next step depends on; the file appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    saved = {name: part.state_dict() for name, part in state.items()}
    random = {"decisions": generator.get_state(), "dropout": torch.get_rng_state()}
    torch.save({**saved, "random": random, "step": step}, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)


def _restore(file: Path, state: dict[str, Any], generator: torch.Generator) -> int:
    """The step that was done last; tensors and plain values only are read from the file."""
    saved = torch.load(file, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    generator.set_state(saved["random"]["decisions"])
    torch.set_rng_state(saved["random"]["dropout"])
    return saved["step"]
