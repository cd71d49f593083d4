"""Preparing any backbone on a data set of its task (``sd-gym prepare``)."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import is_initialized
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.checks import check_positions, has_bf16, positions_of, usable_device
from sd_gym.backbones.draws import layer_importance
from sd_gym.backbones.heads import head_of
from sd_gym.backbones.heads.label import labels_of, stored_labels
from sd_gym.backbones.load import head_stored_with, load_model, save_backbone
from sd_gym.backbones.prepare import Recipe, freeze_observation, prepare
from sd_gym.config import BackboneConfig, DataConfig, TokensConfig
from sd_gym.files import write_json
from sd_gym.folders import locked
from sd_gym.switch import Switchboard
from sd_gym.tasks.backbone_rows import backbone_part, backbone_rows, row_hashes, write_backbone_rows
from sd_gym.tasks.cache import encode_cached
from sd_gym.tasks.data import Instances
from sd_gym.tasks.family import TASKS
from sd_gym.tasks.preparation_record import (
    CHECKPOINT,
    INTERRUPTED,
    OnStep,
    check_same,
    curves,
    figures_of,
    interrupted_settings,
    rows_of,
    settings_of,
    write_report,
)
from sd_gym.tasks.ranking import training_rarity
from sd_gym.tasks.splits import Splits, check_unchanged
from sd_gym.tasks.token_dropping import TokenDropping
from sd_gym.tasks.validation import EncodedSplit, MeanQuality

BACKBONE_ROWS = 0.6  # share of the training split
HELD_OUT = 2000  # the most rows that it is validated on
SHARED = 0.05  # share of rows that other data sets may have in common


def prepare_backbone(
    backbone: BackboneConfig,
    data: DataConfig,
    task: str,
    output: Path,
    recipe: Recipe,
    *,
    rows: float = BACKBONE_ROWS,
    tokens: TokensConfig = TokensConfig(),  # noqa: B008  (frozen)
    label_range: float = 1.0,
    skip_logits: Mapping[str, NDArray] | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    on_step: OnStep = lambda step, figures: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    """Fine-tune a backbone on a task so that it is robust to skipping, and save it with its tokenizer and a report.

    Processes started by ``accelerate launch`` share the work; the first one writes. The weights are saved before they
    are evaluated. It computes in bfloat16 if the processor supports that, unless the environment variable
    ACCELERATE_MIXED_PRECISION sets another format (``no``: float32).

    Args:
        backbone: A supported model, with lengths and perhaps a prompt. It gets a new head if the task needs one to
            classify or extract; for other answers it must generate.
        data: The data set. Errors in its validation and test splits are raised, too; they are not learned from.
        task: Name of the task.
        output: Folder to write to: the model, the hashes of its rows, report, picture and TensorBoard's events.
        recipe: Steps, rates and draws; its ``batch_size`` is per process. With a ``max_rate`` of 0 and no tokens to
            drop, this is plain dense fine-tuning.
        rows: Share of the training split, up to 1.0, or number of its rows to prepare on (see ``backbone_part``). A
            backbone that was prepared before keeps its rows. Policies learn on the others. Up to 2,000 of those are
            for validation; if there are none, the validation split is.
        tokens: Shares of the tokens to drop, of which each row draws one, and the ranking of tokens. With
            ``attention``, it is that of the backbone before it is prepared.
        label_range: The config's ``quality.label_range``.
        skip_logits: The log-odds by which a policy skips each switch, float32 ``[n, switches]`` for ``train`` and
            ``validation``, to tune the backbone under it. See ``decisions_around`` and ``freeze_observation``.
        resume: Whether to continue from the checkpoint in ``output``, if there is one.
        checkpoint_minutes: Minutes between two checkpoints.
        on_step: See ``sd_gym.backbones.prepare``; called in the first process.
        on_phase: Called in the first process with the name of each phase that begins.

    Returns:
        The report, as in ``preparation.json``. Its held-out quality is by step, by random skip rate (with
        ``draw="layers"``: by the share of the least important layers skipped) and by share of tokens dropped.

    Raises:
        FileExistsError: If ``output`` has anything but an interrupted preparation to be resumed;
            ``FolderInUseError`` if another process is writing to it.
        ValueError: If the backbone cannot do the task, or the preparation to resume has other data or settings.
        FloatingPointError: If the loss is not finite.
        FileNotFoundError, DataError, UnsupportedArchitectureError: See ``load_model`` and ``load_split``.
    """
    accelerator = _accelerator(backbone.device)
    first = accelerator.is_main_process
    if recipe.max_rate == 0 and len(tokens.shares) == 1:
        recipe = replace(recipe, dense_steps=recipe.steps)
    with locked(output) if first else nullcontext():
        interrupted = interrupted_settings(output, resume) if first else None
        splits = Splits(data, task)
        model, tokenizer, board = _switchable(backbone, task, splits, recipe.seed, skip_logits is not None, accelerator)
        reading = head_of(model).prompting(backbone)
        parts = _parts(splits, backbone.name, rows, skip_logits)
        encoded = _encoded(splits, parts, data.unanswerable, board, tokenizer, reading, tokens)
        own = {"task": task, "label_range": label_range, "policy": None if skip_logits is None else _hash(skip_logits)}
        settings = own | settings_of(data, reading, recipe, tokens, accelerator) | rows_of(splits, encoded)
        if interrupted is not None:
            check_unchanged(output, interrupted["data"], splits)
            check_same(output, interrupted, settings)
        mean = MeanQuality(board, encoded["held out"], label_range, reading, accelerator)
        begin = on_phase if first else lambda phase: None

        def evaluate() -> tuple[Tensor | None, list[Any]]:
            begin("evaluating")
            importance = _importance(board, encoded["held out"], recipe, accelerator)
            return importance, [mean.by_rate(importance), mean.by_share()]

        def keep(before: list[Any] | None) -> None:
            if first:
                write_json(output / INTERRUPTED, settings | {"before": before})

        # Without a checkpoint, training starts with the backbone's weights, which may be others now.
        before = interrupted.get("before") if interrupted and (output / CHECKPOINT).exists() else None
        keep(before)
        (before,) = broadcast_object_list([before])
        if before is None:
            _, before = evaluate()
            keep(before)  # generated text takes minutes to evaluate, and is not evaluated again on --resume
        precision = accelerator.mixed_precision
        begin("preparing" if precision == "no" else f"preparing in {precision}")
        with curves(output, on_step, write=first) as log:
            history = prepare(
                board,
                _batches(encoded["backbone"], recipe.batch_size, recipe.seed, accelerator),
                recipe,
                validate=mean.under_decisions,
                checkpoint=output / CHECKPOINT,
                checkpoint_minutes=checkpoint_minutes,
                resume=resume,
                on_step=log,
                accelerator=accelerator,
            )
        if first:
            new = row_hashes(encoded["backbone"].instances)
            write_backbone_rows(output, np.concatenate([new, backbone_rows(backbone.name)]))  # both preparations'
            save_backbone(model, tokenizer, output)
        importance, after = evaluate()  # with the weights that were kept
        board.remove()
        measure = head_of(model).validated_by[1]
        report = settings | figures_of(history, measure, importance, before, after)
        if first:
            write_report(output, report)
        accelerator.wait_for_everyone()
        return report


def _accelerator(device: str) -> Accelerator:
    return Accelerator(
        cpu=device == "cpu",
        device_placement=False,
        mixed_precision=_mixed_precision(device),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _mixed_precision(device: str) -> str | None:
    """The number format; ``None``: that of the environment variable, or of an earlier Accelerator of this process."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ or is_initialized():
        return None
    return "bf16" if has_bf16(usable_device(device)) else "no"


def _importance(board: Switchboard, split: EncodedSplit, recipe: Recipe, accelerator: Accelerator) -> Tensor | None:
    """The layers' ranks on a batch of a split; ``None`` if the recipe does not draw whole layers."""
    if recipe.draw != "layers":
        return None
    return layer_importance(board, next(_batches(split, 32, 0, accelerator)), recipe.max_rate, accelerator)


def _switchable(
    backbone: BackboneConfig, task: str, splits: Splits, seed: int, has_policy: bool, accelerator: Accelerator
) -> tuple[PreTrainedModel, Tokenizer, Switchboard]:
    """The model with the head that the task needs, on its device, its tokenizer, and its switchboard."""
    train, _ = splits["train"], splits["validation"]  # errors in the data are raised first
    torch.manual_seed(seed)
    head, label2id = None, None
    if not has_policy:
        family, (stored, config) = TASKS.find(task), head_stored_with(backbone.name)
        head, label2id = family.head_to_prepare(stored, backbone.answers, train)
        if label2id is not None and stored is head:  # a head that knows the classes keeps its order of them
            label2id = stored_labels(labels_of(config), train) or label2id
        if head is None and (stored is None or stored.gives not in family.gives):
            raise ValueError(f"the backbone {backbone.name!r} does not generate text, which {task} needs")
    # In float32 whatever it is stored in: in half precision most updates would be rounded away.
    count = None if label2id is None else 1 + max(label2id.values())
    model, tokenizer = load_model(backbone.name, head=head, num_labels=count, dtype=torch.float32)
    if label2id is not None:
        if label2id != labels_of(model.config):
            model.config.label2id = label2id
            model.config.id2label = {index: word for word, index in label2id.items()}
        model.config.problem_type = "regression" if count == 1 else "single_label_classification"
    for module in model.modules():  # what is skipped is drawn by the recipe alone
        if getattr(module, "layerdrop", 0):
            vars(module)["layerdrop"] = 0.0
    check_positions(backbone, positions_of(model), tokenizer, head_of(model))
    device = accelerator.device if accelerator.num_processes > 1 else usable_device(backbone.device)
    model.to(device)  # pyright: ignore[reportArgumentType]  (transformers hides the signature of Module.to)
    board = Switchboard(model.eval())
    if has_policy:
        freeze_observation(board)
    return model, tokenizer, board


def _parts(
    splits: Splits, backbone: str, rows: float, skip_logits: Mapping[str, NDArray] | None
) -> dict[str, tuple[Instances, NDArray | None]]:
    """The rows to prepare on (``backbone``) and to validate on (``held out``), with their ``skip_logits``."""
    train, logits = splits["train"], skip_logits or {}
    known = backbone_rows(backbone)
    own = np.isin(row_hashes(train), known)
    # It was not prepared before, or on other data, which may share some rows.
    if 2 * own.sum() <= len(known) and own.mean() < SHARED:
        own |= backbone_part(train, rows)

    def part(positions: NDArray) -> tuple[Instances, NDArray | None]:
        chosen = copy(train)
        chosen.keep(positions.tolist())
        chosen.part = f"{len(positions)} rows of {train.part}"
        return chosen, None if skip_logits is None else skip_logits["train"][positions]

    others = np.flatnonzero(~own)
    if len(others) > HELD_OUT:  # evenly spaced, as files may be sorted by label
        others = others[np.linspace(0, len(others) - 1, HELD_OUT).round().astype(np.int64)]
    held_out = part(others) if len(others) else (splits["validation"], logits.get("validation"))
    return {"backbone": part(np.flatnonzero(own)), "held out": held_out}


def _encoded(
    splits: Splits,
    parts: Mapping[str, tuple[Instances, NDArray | None]],
    unanswerable: bool,
    board: Switchboard,
    tokenizer: Tokenizer,
    reading: BackboneConfig,
    tokens: TokensConfig,
) -> dict[str, EncodedSplit]:
    """The parts as the model reads them; errors in the validation and test splits are raised, too."""
    head, encoded = head_of(board.model), {}
    rarity = cache(lambda: training_rarity(tokenizer, splits["train"]))
    encode = partial(encode_cached, tokenizer=tokenizer, head=head, backbone=reading, unanswerable=unanswerable)
    for name, (instances, logits) in parts.items():
        tensors = encode(instances)
        dropping = TokenDropping(instances, tensors, board, tokenizer, head, reading, tokens, rarity)
        if len(tokens.shares) > 1:  # rank them now, before the backbone is prepared
            _ = dropping.scores, dropping.droppable
        encoded[name] = EncodedSplit(instances, tensors, head, dropping, logits)
    for name in ("validation", "test"):
        if name in splits:
            encode(splits[name])
    return encoded


def _hash(arrays: Mapping[str, NDArray]) -> str:
    return hashlib.blake2b(b"".join(arrays[name].tobytes() for name in sorted(arrays)), digest_size=8).hexdigest()


def _batches(split: EncodedSplit, batch_size: int, seed: int, accelerator: Accelerator) -> Iterator[dict[str, Tensor]]:
    """This process's share of endless shuffled batches, each row at a random token level.

    Every 50 batches are sorted by length and shuffled again.
    """
    random, turn = np.random.default_rng(seed), itertools.cycle(range(accelerator.num_processes))
    window = 50 * batch_size
    lengths = split.encoded.source_length
    levels = len(split.tokens.shares)
    while True:
        order = random.permutation(len(lengths))
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            batches = np.split(rows, range(batch_size, len(rows), batch_size))
            for number in random.permutation(len(batches)):
                level = random.integers(levels, size=len(batches[number]))
                if next(turn) == accelerator.process_index:
                    yield split.batch(batches[number], level)
