"""Preparing a backbone: fine-tuning it on its task so that it bears skipping.

A backbone that was only trained densely breaks when sublayers are skipped. Here every batch runs twice in one pass:
once densely, under the task's loss, and once under random decisions, with the dense output as the soft target (the
"sandwich" of slimmable networks, Yu et al. 2019; LayerDrop, Fan et al. 2020, is the ancestor).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

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
    """Mean cross-entropy of class labels ``[batch]`` or token labels ``[batch, length]`` (-100 counts not)."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def distillation_loss(logits: Tensor, dense_logits: Tensor, labels: Tensor) -> Tensor:
    """Mean KL divergence from the dense output, over the same positions as ``task_loss``; no gradient to the dense."""
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
    source = iter(batches)
    for step in range(1, steps + 1):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step - 1} of {steps} steps")
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
    model.eval()
