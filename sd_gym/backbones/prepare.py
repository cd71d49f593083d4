"""Preparing a backbone: fine-tuning it on its task so that it bears skipping.

A backbone that was only trained densely breaks when sublayers are skipped. Here every batch runs twice in one pass:
once densely, under the task's loss, and once under random decisions, with the dense output as the soft target (the
"sandwich" of slimmable networks, Yu et al. 2019; LayerDrop, Fan et al. 2020, is the ancestor).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sd_gym.backbones.draws import DRAWS, layers_of
from sd_gym.backbones.heads import head_of
from sd_gym.files import damaged_checkpoint, read_checkpoint, write_checkpoint
from sd_gym.switch import Switchboard

CHECKPOINTS = 10  # on the way
BOLDNESS = (-1.0, 2.0)  # between what a policy's log-odds of skipping are shifted
RARE = 0.02  # the least probability of skipping, and of not skipping, a switch
RANDOM_SHARE = 0.3  # of the rows, beside those that a policy decides on


def decisions_around(
    skip_logits: Tensor, random: Tensor, generator: torch.Generator, random_share: float = RANDOM_SHARE
) -> Tensor:
    """Skip vectors around those of a policy, some bolder and some more cautious, among random ones.

    Args:
        skip_logits: The policy's log-odds of skipping each switch, ``[rows, switches]``.
        random: Random skip vectors, ``[rows, switches]``, which a share of the rows takes, so that the backbone bears
            more than this one policy.
        generator: Of what is drawn.
        random_share: That share.

    Returns:
        int64 ``[rows, switches]`` on the CPU.
    """
    rows = len(skip_logits)
    lowest, highest = BOLDNESS
    shifted = skip_logits + lowest + (highest - lowest) * torch.rand(rows, 1, generator=generator)
    probability = shifted.sigmoid().clamp(RARE, 1 - RARE)
    drawn = (torch.rand(probability.shape, generator=generator) < probability).long()
    return torch.where(torch.rand(rows, 1, generator=generator) < random_share, random, drawn)


def freeze_observation(board: Switchboard) -> None:
    """Freeze what a policy sees of an input, in place: all parameters but those of the layers and of the heads.

    So a policy's observation stays what it was while the backbone is tuned under it; what a head shares with the
    embeddings stays too.
    """
    architecture, model = board.architecture, board.model
    layers = [model.base_model.get_submodule(stack.layers) for stack in architecture.stacks]
    heads = {*architecture.token_heads, *architecture.sequence_heads}
    tuned = [*layers, *(module for path, module in model.named_modules() if path in heads)]
    free = {id(parameter) for module in tuned for parameter in module.parameters()}
    shared = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in free - shared)


def sandwich_loss(
    board: Switchboard, batch: dict[str, Tensor], skip: Tensor, call: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The task loss of the dense half and the distillation loss of the half under ``skip``, from one forward pass.

    Args:
        board: The backbone's switchboard.
        batch: The model's inputs with ``labels``, each ``[batch, ...]``; ``keep``, if it is there, bool
            ``[batch, length]``, are the tokens that the switched half keeps.
        skip: Decisions of the switched half, ``[batch, switches]``.
        call: As for ``Head.forward``.
    """
    inputs = {name: value for name, value in batch.items() if name != "keep"}
    doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
    head, keep = head_of(board.model), batch.get("keep")
    if keep is not None:
        keep = head.kept(doubled, torch.cat([torch.ones_like(keep), keep]))
    with board.decide(torch.cat([torch.zeros_like(skip), skip]), keep):
        dense, switched = head.forward(board, doubled, call).chunk(2)
    return head.loss(dense, batch["labels"]), head.distillation(switched, dense, batch["labels"])


@dataclass
class Course:
    """How a preparation went.

    Attributes:
        step: The last step.
        validation: Step and quality of each validation.
        best: The best quality so far; ``-inf`` before the first validation.
        since: Validations since then.
        weights: The model's weights at the best quality; empty before the first validation.
    """

    step: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: float = -math.inf
    since: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def add(self, quality: float, model: torch.nn.Module) -> None:
        """Note a validation, and the weights if none are better; of equally good ones those that learned longer."""
        self.validation.append((self.step, quality))
        self.since = 0 if quality > self.best else self.since + 1
        if quality >= self.best:
            self.best = quality
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}


def prepare(
    board: Switchboard,
    batches: Iterable[dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    dense_steps: int = 0,
    warmup_steps: int = 100,
    max_rate: float = 0.8,
    draw: str = "even",
    random_share: float = RANDOM_SHARE,
    weight_decay: float = 0.01,
    seed: int = 0,
    validate: Callable[[], float] | None = None,
    patience: int | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    accelerator: Accelerator | None = None,
) -> Course:
    """Fine-tune the backbone of ``board`` in place; learning rate warmed up, then a cosine down to zero.

    What is random in a step depends on the seed, the process and the step alone, so that a preparation that goes on
    from a checkpoint does what it would have done.

    Args:
        board: The backbone's switchboard.
        batches: Yields at least ``steps`` batches of the model's inputs with ``labels`` (and ``keep``, see
            ``sandwich_loss``; and ``skip_logits``, of the policy that it is tuned under), for this process alone if
            there are several.
        steps: Optimiser steps in all.
        learning_rate: Peak learning rate of AdamW.
        dense_steps: The first steps run densely only (a backbone that starts from nothing must learn first); all of
            them: the backbone is fine-tuned as usual.
        warmup_steps: Steps of the linear warm-up.
        max_rate: Highest skip rate that a row may draw.
        draw: How decisions are drawn, one of ``DRAWS``.
        random_share: Of the rows, beside those that a policy decides on.
        weight_decay: Of AdamW.
        seed: Of the random decisions and dropout.
        validate: Gives a quality, ten times on the way; the weights of the best one are those that stay. ``None``: the
            last weights stay.
        patience: Validations without a better quality after which the preparation ends; ``None``: it never ends early.
        checkpoint: File that the state is written to ten times on the way; ``None``: none.
        resume: Whether to go on from it, if it is there, as if nothing had happened: the batches that were used are
            drawn again and passed over.
        on_step: Called with the step and its figures (``loss``, ``distillation``, ``learning_rate``; ``quality`` where
            it was validated) after every step.
        accelerator: The processes that share the work; ``None``: this one alone.

    Raises:
        ValueError: If the batches end early, or the checkpoint is damaged.
        FloatingPointError: If the loss is not finite.
    """
    model, head, layers = board.model, head_of(board.model), layers_of(board)
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu", device_placement=False)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)

    def scale(step: int) -> float:
        progress = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
        return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    state, course = {"model": model, "optimizer": optimizer, "schedule": schedule}, Course()
    if resume and checkpoint is not None and checkpoint.exists():
        _restore(checkpoint, state, course)
    done = course.step
    model.train()
    call, optimizer = accelerator.prepare(model, optimizer)
    generator, source, interval = torch.Generator(), iter(batches), max(1, steps // CHECKPOINTS)
    for step in range(1, steps + 1):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step - 1} of {steps} steps")
        if step <= done:
            continue
        if patience is not None and course.since >= patience:
            break
        batch = {name: value.to(model.device) for name, value in batch.items()}
        skip_logits = batch.pop("skip_logits", None)
        random = np.random.SeedSequence([seed, accelerator.process_index, step]).generate_state(2).tolist()
        torch.manual_seed(random[0])  # dropout
        if step <= dense_steps:
            batch.pop("keep", None)
            loss = head.loss(head.forward(board, batch, call), batch["labels"])
            distillation = torch.zeros((), device=model.device)
        else:
            rows = len(batch["labels"])
            skip = DRAWS[draw](rows, layers, max_rate, generator.manual_seed(random[1]))
            if skip_logits is not None:
                skip = decisions_around(skip_logits.cpu(), skip, generator, random_share)
            loss, distillation = sandwich_loss(board, batch, skip, call)
        total = loss + distillation
        optimizer.zero_grad()
        accelerator.backward(total)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        figures = {"loss": loss, "distillation": distillation}
        figures = {name: value.item() for name, value in figures.items()} | {"learning_rate": schedule.get_last_lr()[0]}
        schedule.step()
        if not math.isfinite(total.item()):
            raise FloatingPointError(f"the loss is {total.item()} at step {step}; try a lower learning rate")
        course.step = step
        if validate is not None and (step % interval == 0 or step == steps):
            model.eval()
            figures["quality"] = validate()
            course.add(figures["quality"], model)
            model.train()
        if on_step is not None:
            on_step(step, figures)
        if checkpoint is not None and step % interval == 0 and accelerator.is_main_process:
            _save(checkpoint, state, course)
    accelerator.unwrap_model(call, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if course.weights:
        model.load_state_dict(course.weights)
    model.eval()
    return course


def _save(file: Path, state: dict[str, Any], course: Course) -> None:
    """Everything that the next step depends on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    saved = {name: part.state_dict() for name, part in state.items()}
    write_checkpoint(file, {**saved, "course": vars(course)})


def _restore(file: Path, state: dict[str, Any], course: Course) -> None:
    saved = read_checkpoint(file)
    try:
        for name, part in state.items():
            part.load_state_dict(saved[name])
        vars(course).update(saved["course"])
    except Exception as error:  # whatever does not fit
        raise ValueError(damaged_checkpoint(file, error)) from error
