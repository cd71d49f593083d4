"""Preparing any backbone on a data set of its task (``sd-gym prepare``)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sd_gym.backbones.checks import check_positions, usable_device
from sd_gym.backbones.heads import head_of
from sd_gym.backbones.load import head_stored_with, load_model, save_backbone
from sd_gym.backbones.prepare import Recipe, freeze_observation, prepare
from sd_gym.config import BackboneConfig, DataConfig, QualityConfig, TokensConfig
from sd_gym.data.instance import Instance
from sd_gym.files import as_json, read_json, write_json
from sd_gym.folders import MARKER, contents, foreign, locked
from sd_gym.switch import Switchboard
from sd_gym.tasks.cache import encode_cached
from sd_gym.tasks.dropping import TokenDropping
from sd_gym.tasks.family import TASKS
from sd_gym.tasks.ranking import training_rarity
from sd_gym.tasks.splits import Splits, check_unchanged
from sd_gym.tasks.validation import Part, Score
from sd_gym.version import __version__

CUT_OFF = "preparing.json"  # the settings, while a preparation runs


def prepare_backbone(
    backbone: BackboneConfig,
    data: DataConfig,
    task: str,
    output: Path,
    recipe: Recipe,
    *,
    tokens: TokensConfig = TokensConfig(),  # noqa: B008  (frozen)
    quality: QualityConfig = QualityConfig(),  # noqa: B008
    skip_logits: Mapping[str, NDArray] | None = None,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    """Fine-tune a backbone on a task so that it is robust to skipping, and save it with its tokenizer and a report.

    Started by ``accelerate launch``, several processes share the work, each with batches of its own (so
    ``recipe.batch_size`` is that of one process); the first one writes. The weights are saved before they are
    evaluated.

    Args:
        backbone: A supported model, as an env's configuration has it: lengths, and of decoder-only ones the prompt,
            after which the loss is. For classification a head of the right size is put on it if it has none, for
            extracted answers one that marks spans; for anything else it must generate.
        data: The data set. Nothing is learned or measured on its test split, but errors in it are told early, and it is
            compared with what is learned from.
        task: ``classification`` (or regression, where the labels are scores), ``question_answering`` or
            ``summarization``.
        output: Folder to write to: the model, ``preparation.json``, ``preparation.png`` (quality against skip rate) and
            TensorBoard's events; ``checkpoint.pt`` and ``preparing.json`` while the preparation runs.
        recipe: Steps, rates and draws. With a ``max_rate`` of 0 and no tokens to drop the backbone is fine-tuned
            densely, as usual.
        tokens: Shares of the tokens to drop that a row draws from, and which go first; by ``attention``, that of the
            backbone before it is prepared.
        quality: Its ``label_range`` counts.
        skip_logits: To tune it under a policy: of ``train`` and ``validation``, the log-odds by which the policy skips
            each switch for each instance, float32 ``[n, switches]``. Then decisions are drawn around the policy's
            (``decisions_around``), and what the policy observes is frozen (``freeze_observation``).
        resume: Whether to go on from the checkpoint in ``output``, if there is one.
        on_step: As for ``sd_gym.backbones.prepare``; called in the first process.
        on_phase: Called in the first process with what begins: ``evaluating`` (before and after), ``preparing``.

    Returns:
        The report, also in ``preparation.json``: settings; how many instances there are, were left out (empty) and cut;
        the course of the validation quality; and mean quality on the validation split by random skip rate, and by the
        share of tokens dropped, before and after. Quality is accuracy (nearness, of scores) where the backbone
        classifies, F1 where it extracts answers, the likelihood of the reference where it generates.

    Raises:
        FileExistsError: If ``output`` holds anything but a preparation that was cut off and is to be resumed;
            ``FolderInUseError`` if another process is writing to it.
        FileNotFoundError, DataError, UnsupportedArchitectureError: As loading raises.
        ValueError: If the backbone cannot do the task, or the preparation to resume has other data or settings.
        FloatingPointError: If the loss is not finite.
    """
    accelerator = Accelerator(
        cpu=backbone.device == "cpu",
        device_placement=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    first = accelerator.is_main_process
    if recipe.max_rate == 0 and len(tokens.shares) == 1:
        recipe = replace(recipe, dense_steps=recipe.steps)
    with locked(output) if first else nullcontext():
        there = _there(output, resume) if first else None
        splits = Splits(data, task)
        model, tokenizer, board = _switchable(backbone, task, splits, recipe.seed, skip_logits is not None, accelerator)
        reading = head_of(model).prompting(backbone)
        parts = _parts(splits, data, board, tokenizer, reading, tokens, skip_logits)
        settings = _settings(reading, data, task, recipe, tokens, quality, accelerator)
        settings |= {"data": {name: part.provenance for name, part in parts.items()}}
        settings |= {"policy": None if skip_logits is None else _hash(skip_logits)}
        if first:
            if there is not None:
                check_unchanged(output, there["data"], splits)
                _check_same(output, there, settings)
            write_json(output / CUT_OFF, settings)
        score = Score(board, parts["validation"], quality, reading, accelerator)
        say = on_phase if first else lambda phase: None
        say("evaluating")
        before = score.by_rate(), score.by_share()
        say("preparing")
        with _curves(output, on_step, write=first) as log:
            course = prepare(
                board,
                _batches(parts["train"], recipe.batch_size, recipe.seed, accelerator),
                recipe,
                validate=lambda: score.under_decisions(recipe.max_rate, recipe.draw),
                checkpoint=output / "checkpoint.pt",
                resume=resume,
                on_step=log,
                accelerator=accelerator,
            )
        if first:
            save_backbone(model, tokenizer, output)
        say("evaluating")
        after = score.by_rate(), score.by_share()
        board.remove()
        report = {
            **settings,
            "steps_done": course.step,
            "validation": [{"step": step, "quality": value} for step, value in course.validation],
            "measure": score.name,
            "quality": {"before": before[0], "after": after[0]},
            "quality_by_token_share": {"before": before[1], "after": after[1]},
        }
        if first:
            _report(report, output)
        accelerator.wait_for_everyone()
        return report


def _switchable(
    backbone: BackboneConfig, task: str, splits: Splits, seed: int, as_it_is: bool, accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Switchboard]:
    """The model on its device, its tokenizer, and its switchboard; ``as_it_is``: as a policy knows it."""
    train = splits["train"], splits["validation"]  # errors in the data come first
    torch.manual_seed(seed)
    model, tokenizer = load_model(backbone.name) if as_it_is else _load(backbone, task, train[0])
    check_positions(backbone, model, tokenizer, head_of(model))
    model.to(accelerator.device if accelerator.num_processes > 1 else usable_device(backbone.device))
    board = Switchboard(model.eval())
    if as_it_is:
        freeze_observation(board)
    return model, tokenizer, board


def _parts(
    splits: Splits,
    data: DataConfig,
    board: Switchboard,
    tokenizer: PreTrainedTokenizerBase,
    reading: BackboneConfig,
    tokens: TokensConfig,
    skip_logits: Mapping[str, NDArray] | None,
) -> dict[str, Part]:
    """``train`` and ``validation`` as the model reads them; what is wrong with ``test`` is told too."""
    head, parts = head_of(board.model), {}
    rarity = cache(lambda: training_rarity(tokenizer, splits["train"]))
    encoded = partial(encode_cached, tokenizer=tokenizer, head=head, backbone=reading, unanswerable=data.unanswerable)
    for name in ("train", "validation"):
        split, logits = splits[name], None if skip_logits is None else skip_logits[name]
        tensors = encoded(split)
        dropping = TokenDropping(split, tensors, board, tokenizer, head, reading, tokens, rarity)
        if len(tokens.shares) > 1:  # as the backbone ranks them before it is prepared
            dropping.scores, dropping.droppable  # noqa: B018
        parts[name] = Part(split, tensors, head, dropping, logits)
    if "test" in splits:
        encoded(splits["test"])
    return parts


def _settings(
    reading: BackboneConfig,
    data: DataConfig,
    task: str,
    recipe: Recipe,
    tokens: TokensConfig,
    quality: QualityConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What a preparation that goes on must share with the one that was cut off."""
    return {
        MARKER: __version__,
        "backbone": reading.name,
        "source": data.model_dump(),
        "task": task,
        **asdict(recipe),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "prompt": reading.prompt,
        "stop": reading.stop,
        "max_source_length": reading.max_source_length,
        "max_target_length": reading.max_target_length,
        "token_shares": list(tokens.shares),
        "token_ranking": tokens.ranking,
        "label_range": quality.label_range,
    }


@contextmanager
def _curves(
    output: Path, on_step: Callable[[int, dict[str, float]], None], *, write: bool
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """What notes each step for TensorBoard, and passes it on; in the process that writes."""
    writer: SummaryWriter | None = None

    def log(step: int, figures: dict[str, float]) -> None:
        nonlocal writer
        if not write:
            return
        if writer is None:  # what a run that was cut off wrote from here on counts no more
            writer = SummaryWriter(output, purge_step=step)
        for name, value in figures.items():
            writer.add_scalar(f"validation/{name}" if name == "quality" else f"train/{name}", value, step)
        on_step(step, figures)

    try:
        yield log
    finally:  # what was logged is in the folder when an error leaves it, and no thread writes there any more
        if writer is not None:
            writer.close()


def _report(report: dict[str, Any], output: Path) -> None:
    """Write what came of it, and take away what going on needed."""
    plot_preparation(report, output / "preparation.png")
    write_json(output / "preparation.json", report)
    for name in ("checkpoint.pt", CUT_OFF):
        (output / name).unlink(missing_ok=True)


def _there(output: Path, resume: bool) -> dict[str, Any] | None:
    """The settings of the preparation in the folder that is to be resumed; ``None``: the folder is empty.

    Raises:
        FileExistsError: If the folder holds anything else.
    """
    if not contents(output):
        return None
    if not (output / CUT_OFF).exists():
        if (output / "config.json").exists():
            raise FileExistsError(f"{output} holds a model; choose another --output")
        raise foreign(output, "preparation that was cut off")
    if not resume:
        raise FileExistsError(
            f"{output} holds a preparation that was cut off; go on with --resume, or choose another --output"
        )
    return read_json(output / CUT_OFF)


def _check_same(output: Path, there: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the preparation in the folder, of which ``there`` tells, has other settings."""
    here = json.loads(as_json(settings))
    named = [key for key in here if key not in (MARKER, "source", "data")]  # data that are the same may have moved
    differ = [f"its {key} is {there.get(key)}, now it is {here[key]}" for key in named if there.get(key) != here[key]]
    if differ:
        raise ValueError(f"{output} holds another preparation: {', '.join(differ)}")


def _hash(arrays: Mapping[str, NDArray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _load(
    backbone: BackboneConfig, task: str, train: list[Instance]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with the head that the task needs."""
    family, stored = TASKS.find(task), head_stored_with(backbone.name)
    head, label2id = family.head_to_prepare(stored, backbone.answers, train)
    if head is None and (stored is None or stored.gives not in family.gives):
        raise ValueError(f"the backbone {backbone.name!r} does not generate text, which {task} needs")
    if label2id is None:
        return load_model(backbone.name, head=head)
    model, tokenizer = load_model(backbone.name, head=head, num_labels=len(label2id))
    model.config.label2id = label2id
    model.config.id2label = {index: word for word, index in label2id.items()}
    return model, tokenizer


def _batches(part: Part, batch_size: int, seed: int, accelerator: Accelerator) -> Iterator[dict[str, Tensor]]:
    """This process's share of endless shuffled batches, each row at a random token level."""
    random = np.random.default_rng(seed)
    drawn = _draws(part.encoded.source_length, batch_size, len(part.tokens.shares), random)
    for rows, level in itertools.islice(drawn, accelerator.process_index, None, accelerator.num_processes):
        yield part.batch(rows, level)


def _draws(
    lengths: NDArray, batch_size: int, levels: int, random: np.random.Generator
) -> Iterator[tuple[NDArray, NDArray]]:
    """Endless shuffled rows with their token levels; in a window of 50 batches, rows of similar length go together."""
    window = 50 * batch_size
    while True:
        order = random.permutation(len(lengths))
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(lengths[part], kind="stable")]
            batches = np.split(part, range(batch_size, len(part), batch_size))
            for number in random.permutation(len(batches)):
                yield batches[number], random.integers(levels, size=len(batches[number]))


def plot_preparation(report: dict[str, Any], file: Path) -> None:
    """Quality against skip rate and share of tokens dropped, before and after, and its course, as one PNG."""
    panels = [("skip rate of every sublayer", report["quality"])]
    if report["quality_by_token_share"]["after"]:
        panels.append(("share of tokens dropped", report["quality_by_token_share"]))
    figure = Figure(figsize=(5 * (len(panels) + 1), 4), layout="constrained")
    FigureCanvasAgg(figure)
    *curves, course = figure.subplots(1, len(panels) + 1)
    for axes, (label, values) in zip(curves, panels, strict=True):
        for name, marker in (("before", "s"), ("after", "o")):
            axes.plot([float(x) for x in values[name]], list(values[name].values()), marker=marker, label=name)
        axes.set(xlabel=label, ylabel=f"{report['measure']}, validation split", ylim=(0, 1.03))
        axes.legend(loc="lower left")
    course.plot([one["step"] for one in report["validation"]], [one["quality"] for one in report["validation"]], "o-")
    course.set(xlabel="step", ylabel=f"{report['measure']} under random decisions", ylim=(0, 1.03))
    for axes in (*curves, course):
        axes.grid(alpha=0.3)
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=100)
    os.replace(temporary, file)
