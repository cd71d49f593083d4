"""Preparing a backbone: fine-tuning it on its task so that it stays accurate when sublayers are skipped.

A backbone that was only trained densely loses its accuracy when sublayers are skipped. Here a pass runs every batch
twice: once densely, with the task's loss, and once under random decisions, with the dense output as the soft target
(the "sandwich rule" of slimmable networks, Yu et al. 2019; see also LayerDrop, Fan et al. 2020).
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sd_gym.backbones.draws import DRAWS, Drawing, decisions_around, layer_importance, layers_of
from sd_gym.backbones.heads import head_of
from sd_gym.files import damaged_checkpoint, read_checkpoint, write_checkpoint
from sd_gym.switch import Switchboard

VALIDATIONS = 10  # per preparation, at most
RISEN = 0.6  # share of the steps after which the number of whole layers is highest; it rises from a third of that


def freeze_observation(board: Switchboard) -> None:
    """Freeze in place what a policy's observation depends on: all parameters but those of layers and heads.

    Parameters that a head shares with the embeddings are frozen, too.
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

    ``batch`` has the model's inputs and ``labels``, each ``[batch, ...]``. It may have ``keep``, bool
    ``[batch, length]``: the tokens that the switched half keeps. ``call``: see ``Head.forward``.
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
class TrainingHistory:
    """The state of a preparation, apart from the model and the optimiser."""

    step: int = 0  # the last step
    validation: list[tuple[int, float]] = field(default_factory=list)  # step and quality of each validation
    best: float = -math.inf  # the best quality so far
    since: int = 0  # validations since the best one
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)  # the model's weights at the best quality
    importance: Tensor | None = None  # the last ``layer_importance``; ``None``: not measured

    def add(self, quality: float, model: torch.nn.Module) -> None:
        """Add a validation, and keep the model's weights unless earlier ones were better."""
        self.validation.append((self.step, quality))
        self.since = 0 if quality > self.best else self.since + 1
        if quality >= self.best:
            self.best = quality
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Recipe:
    """How a backbone is fine-tuned."""

    steps: int  # optimiser steps in all
    learning_rate: float = 5e-5  # peak of AdamW's rate: after a linear warm-up, it falls to zero as a cosine
    batch_size: int = 32  # instances per step
    accumulate: int = 1  # number of parts that a batch is split into, to need less memory
    max_rate: float = 0.6  # highest skip rate that a row may draw
    draw: str = "even"  # how decisions are drawn, one of ``DRAWS``
    patience: int | None = None  # it ends after so many validations without progress; ``None``: never early
    seed: int = 0  # seed of a new head, the batches, the random decisions and dropout
    dense_steps: int = 0  # the first steps run only densely, for a backbone that is trained from scratch
    warmup_steps: int | None = None  # steps of the warm-up; ``None``: a tenth of all

    @property
    def interval(self) -> int:
        """Steps between two validations, and between two measurements of the layers' importance."""
        return math.ceil(self.steps / VALIDATIONS)

    def rate_at(self, step: int) -> float:
        """The learning rate at a step, counted from 0, as a share of the peak."""
        warmup = max(1, self.steps // 10 if self.warmup_steps is None else self.warmup_steps)
        progress = max(0, step - warmup) / max(1, self.steps - warmup)
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def max_rate_at(self, step: int) -> float:
        """The highest skip rate at a step, counted from 1; that of whole layers rises."""
        if self.draw != "layers":
            return self.max_rate
        return self.max_rate * (1 + 2 * min(1.0, step / (RISEN * self.steps))) / 3


def prepare(
    board: Switchboard,
    batches: Iterable[dict[str, Tensor]],
    recipe: Recipe,
    *,
    validate: Callable[[Drawing], float] | None = None,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = 10.0,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    accelerator: Accelerator | None = None,
) -> TrainingHistory:
    """Fine-tune the backbone of ``board`` in place.

    The random numbers of a step depend only on the seed, the process and the step. So a resumed preparation gives the
    same result as an uninterrupted one.

    Args:
        board: The backbone's switchboard.
        batches: Yields at least ``recipe.steps`` batches for this process, each with the model's inputs and ``labels``.
            A batch may have ``keep`` (see ``sandwich_loss``) and ``skip_logits`` (see ``decisions_around``).
        recipe: Steps, rates and draws.
        validate: Measures the quality under decisions drawn as at the last step; called at most ten times. The
            weights with the best quality are kept. ``None``: the last weights are kept.
        checkpoint: File that the state is written to, if any, and read from to ``resume``.
        checkpoint_minutes: Minutes between two checkpoints.
        resume: Whether to continue from the checkpoint, if it exists. ``batches`` must start from the beginning.
        on_step: Called after every step with its losses and, after a validation, ``quality``.
        accelerator: The processes that share the work; ``None``: only this one.

    Raises:
        ValueError: If the batches end early, or the checkpoint is damaged.
        FloatingPointError: If the loss is not finite.
    """
    model = board.model
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu", device_placement=False)
    trainer, history = _Trainer(board, recipe, accelerator), TrainingHistory()
    state = {"model": model, "optimizer": trainer.optimizer, "schedule": trainer.schedule}
    if resume and checkpoint is not None and checkpoint.exists():
        _restore(checkpoint, state, history)
    model.train()
    done = history.step
    source, written = iter(batches), time.monotonic()
    for step in range(1, recipe.steps + 1):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step - 1} of {recipe.steps} steps")
        if step <= done:
            continue
        if recipe.patience is not None and history.since >= recipe.patience:
            break
        if recipe.draw == "layers" and (history.importance is None or step % recipe.interval == 0):
            history.importance = layer_importance(board, batch, recipe.max_rate, accelerator)
        figures = trainer.train(step, batch, history.importance)
        history.step = step
        if validate is not None and (step % recipe.interval == 0 or step == recipe.steps):
            model.eval()
            figures["quality"] = validate(trainer.drawing(history.importance))
            history.add(figures["quality"], model)
            model.train()
        if on_step is not None:
            on_step(step, figures)
        due = time.monotonic() - written >= 60 * checkpoint_minutes
        if checkpoint is not None and due and accelerator.is_main_process:
            saved = {name: part.state_dict() for name, part in state.items()}
            write_checkpoint(checkpoint, {**saved, "course": vars(history)})
            written = time.monotonic()
    accelerator.unwrap_model(trainer.call, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if history.weights:
        model.load_state_dict(history.weights)
    model.eval()
    return history


class _Trainer:
    def __init__(self, board: Switchboard, recipe: Recipe, accelerator: Accelerator) -> None:
        self._board = board
        self._recipe = recipe
        self._accelerator = accelerator
        self._model = board.model
        self._head = head_of(board.model)
        self._layers = layers_of(board)
        self._generator = torch.Generator()
        learned = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate_at)
        self.call, self.optimizer = accelerator.prepare(self._model, optimizer)  # shared among the processes

    def drawing(self, importance: Tensor | None, step: int | None = None) -> Drawing:
        """A function that draws decisions as at a step; ``None``: the last one."""
        recipe = self._recipe
        rate = recipe.max_rate_at(recipe.steps if step is None else step)
        return lambda rows, generator: DRAWS[recipe.draw](rows, self._layers, rate, generator, importance)

    def train(self, step: int, batch: dict[str, Tensor], importance: Tensor | None) -> dict[str, float]:
        """Make one step, counted from 1, on a batch; returns its losses and learning rate."""
        rows, skip = len(batch["labels"]), self._decisions(step, batch, importance)
        inputs = {name: value.to(self._model.device) for name, value in batch.items() if name != "skip_logits"}
        parts = torch.arange(rows).tensor_split(min(rows, self._recipe.accumulate))
        self.optimizer.zero_grad()
        total, counted = torch.zeros(2, device=self._model.device), self._head.counted(inputs["labels"]).clamp(min=1)
        for number, part in enumerate(parts, start=1):
            with self._accelerator.no_sync(self.call) if number < len(parts) else nullcontext():
                batch_part = {name: value[part.to(value.device)] for name, value in inputs.items()}
                share = self._head.counted(batch_part["labels"]) / counted
                losses = self._losses(batch_part, None if skip is None else skip[part]) * share
                self._accelerator.backward(losses.sum())
            total += losses.detach()
        self._accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
        self.optimizer.step()
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        loss, distillation = total.tolist()
        if not math.isfinite(loss + distillation):
            raise FloatingPointError(f"the loss is {loss + distillation} at step {step}; try a lower learning rate")
        return {"loss": loss, "distillation": distillation, "learning_rate": rate}

    def _decisions(self, step: int, batch: dict[str, Tensor], importance: Tensor | None) -> Tensor | None:
        """The decisions of a step, int64 ``[rows, switches]``; ``None``: it runs only densely."""
        recipe, skip_logits = self._recipe, batch.get("skip_logits")
        seeds = np.random.SeedSequence([recipe.seed, self._accelerator.process_index, step]).generate_state(2).tolist()
        torch.manual_seed(seeds[0])  # dropout
        if step <= recipe.dense_steps:
            return None
        generator = self._generator.manual_seed(seeds[1])
        skip = self.drawing(importance, step)(len(batch["labels"]), generator)
        if skip_logits is None:
            return skip
        return decisions_around(skip_logits.cpu(), skip, generator)

    def _losses(self, batch: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        """The task loss and the distillation loss, ``[2]``."""
        if skip is not None:
            return torch.stack(sandwich_loss(self._board, batch, skip, self.call))
        batch.pop("keep", None)
        loss = self._head.loss(self._head.forward(self._board, batch, self.call), batch["labels"])
        return torch.stack([loss, torch.zeros_like(loss)])


def _restore(file: Path, state: dict[str, Any], history: TrainingHistory) -> None:
    saved = read_checkpoint(file)
    try:
        for name, part in state.items():
            part.load_state_dict(saved[name])
        vars(history).update(saved["course"])
    except Exception as error:  # torch raises errors of many kinds
        raise ValueError(damaged_checkpoint(file, error)) from error
