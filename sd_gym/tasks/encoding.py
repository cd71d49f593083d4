"""Instances as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sd_gym.tasks.data import DataError
from sd_gym.tasks.instance import Instance
from sd_gym.tasks.metrics import IGNORED


@dataclass(frozen=True)
class Encoded:
    """A whole split as padded tensors; batches are cut out of it.

    Attributes:
        input_ids: int64 ``[n, longest source]``, padded at the right.
        source_length: int64 ``[n]``, tokens of each input.
        labels: int64 ``[n, longest target]`` padded with -100 where the backbone generates, class indices ``[n]``
            where it classifies, scores float32 ``[n]`` where it has a single output (regression).
        target_length: int64 ``[n]``, tokens of each target; 1 where the backbone classifies.
        token_type_ids: int64 like ``input_ids`` for sentence pairs, else ``None``.
    """

    input_ids: Tensor
    source_length: np.ndarray
    labels: Tensor
    target_length: np.ndarray
    token_type_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, indices: NDArray, device: torch.device, *, padding_side: str = "right") -> dict[str, Tensor]:
        """The model's inputs of some instances, cut to the longest of them, on ``device``.

        Prompts that are gone on with are padded at the left, so that all answers begin at the same place.
        """
        rows = torch.from_numpy(np.asarray(indices))
        length = torch.from_numpy(self.source_length[indices])[:, None]
        longest = int(length.max())
        present = torch.arange(longest) < length
        input_ids = self.input_ids[rows, :longest]
        if padding_side == "left":
            input_ids, present = left_padded(input_ids, length), present.flip(1)
        inputs = {"input_ids": input_ids, "attention_mask": present.long()}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids[rows, :longest]
        labels = self.labels[rows]
        inputs["labels"] = (
            labels if labels.ndim == 1 else labels[:, : int(self.target_length[indices].max())].contiguous()
        )
        return {key: value.to(device) for key, value in inputs.items()}


def left_padded(values: Tensor, length: Tensor) -> Tensor:
    """``values [n, longest]``, padded at the right, with the padding at the left; ``length`` is ``[n, 1]``."""
    longest = values.shape[1]
    return values.gather(1, (torch.arange(longest) - longest + length) % longest)


def encode(
    instances: list[Instance],
    tokenizer: PreTrainedTokenizerBase,
    *,
    generates: bool,
    max_source_length: int,
    max_target_length: int,
    label2id: dict[str, int] | None = None,
    prompt: str | None = None,
) -> Encoded:
    """Tokenise instances; what is longer than the limits is cut.

    Args:
        instances: What to encode.
        tokenizer: The backbone's tokenizer.
        generates: Whether targets are texts to generate (else: class indices).
        max_source_length: Longest input, in tokens.
        max_target_length: Longest target, in tokens.
        label2id: Class indices of label words, for backbones that classify.
        prompt: For decoder-only backbones, what the input is put into: ``{source}`` and, for question answering,
            ``{source_pair}`` (the context) are filled in; it is never cut.

    Raises:
        DataError: If a label is none of the backbone's classes.
    """
    source = _tokenize_sources(instances, tokenizer, max_source_length, prompt)
    if prompt is not None:
        labels, target_length = _answers(instances, tokenizer, max_target_length)
    elif generates:
        targets = tokenizer(
            text_target=[str(instance.target) for instance in instances],
            truncation=True,
            max_length=max_target_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = targets.input_ids.masked_fill(targets.attention_mask == 0, IGNORED)
        target_length = targets.attention_mask.sum(dim=1).numpy()
    else:
        labels = _labels(instances, label2id or {})
        target_length = np.ones(len(instances), dtype=np.int64)
    return Encoded(
        input_ids=source.input_ids,
        source_length=source.attention_mask.sum(dim=1).numpy(),
        labels=labels,
        target_length=target_length,
        token_type_ids=source.get("token_type_ids") if any(one.source_pair is not None for one in instances) else None,
    )


def droppable_tokens(
    instances: list[Instance], tokenizer: PreTrainedTokenizerBase, max_source_length: int, prompt: str | None = None
) -> NDArray:
    """Which tokens of the encoded inputs may be dropped: bool ``[n, longest source]``.

    Never: special tokens, padding, what an instance protects, and of a prompt all but the document. Tokenised as
    ``encode`` does.

    Raises:
        ValueError: If the tokenizer cannot tell where its tokens come from.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"dropping tokens needs a fast tokenizer, got {type(tokenizer).__name__}")
    wanted = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    tokens = _tokenize_sources(instances, tokenizer, max_source_length, prompt, **wanted)
    droppable = (tokens.special_tokens_mask == 0).numpy()
    start, end = tokens.offset_mapping.numpy()[..., 0], tokens.offset_mapping.numpy()[..., 1]
    for row, instance in enumerate(instances):
        first = np.array([number == 0 for number in tokens.sequence_ids(row)])
        protected, shift = instance.protected, 0
        if prompt is not None:
            field = _document(instance)
            before, _, after = prompt.partition(f"{{{field}}}")
            shift = len(before.format(source=instance.source))
            last = end[row].max() - len(after.format(source=instance.source))
            droppable[row] &= (start[row] >= shift) & (end[row] <= last)
            protected = protected if field == "source" else ()
        for begin, stop in protected:
            droppable[row] &= ~(first & (start[row] < stop + shift) & (end[row] > begin + shift))
    return droppable


def _tokenize_sources(
    instances: list[Instance],
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    prompt: str | None,
    **wanted: bool,
) -> BatchEncoding:
    limit = min(max_source_length, tokenizer.model_max_length)
    padding = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    if prompt is not None:
        return tokenizer(_prompts(instances, tokenizer, limit, prompt), **padding, **wanted)
    pairs = [instance.source_pair for instance in instances]
    return tokenizer(
        [instance.source for instance in instances],
        [pair or "" for pair in pairs] if any(pair is not None for pair in pairs) else None,
        truncation=True,
        max_length=limit,
        **padding,
        **wanted,
    )


def _document(instance: Instance) -> str:
    """The field of a prompt that may be long: the context of a question, else the source."""
    return "source" if instance.source_pair is None else "source_pair"


def _prompts(instances: list[Instance], tokenizer: PreTrainedTokenizerBase, limit: int, prompt: str) -> list[str]:
    """Each instance's prompt, its document cut so that the whole has about ``limit`` tokens.

    Raises:
        DataError: If the prompt leaves no room, or does not name the fields.
    """
    documents = [getattr(instance, _document(instance)) for instance in instances]
    for instance in instances[:1]:
        if f"{{{_document(instance)}}}" not in prompt or (instance.source_pair and "{source}" not in prompt):
            raise DataError(f"the prompt must name {{source}} (and {{source_pair}}, for a context), got {prompt!r}")
    frames = [prompt.format(**{"source": instance.source, _document(instance): ""}) for instance in instances]
    used = [len(ids) for ids in tokenizer(frames).input_ids]
    offsets = tokenizer(documents, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    texts = []
    for instance, document, taken, places in zip(instances, documents, used, offsets, strict=True):
        room = limit - taken
        if room < 1:
            raise DataError(f"instance {instance.id}: the prompt alone has {taken} of max_source_length {limit} tokens")
        text = document if len(places) <= room else document[: places[room - 1][1]]
        texts.append(prompt.format(**{"source": instance.source, _document(instance): text}))
    return texts


def _answers(
    instances: list[Instance], tokenizer: PreTrainedTokenizerBase, max_target_length: int
) -> tuple[Tensor, NDArray]:
    """What a decoder-only backbone shall say behind the prompt: a space, the target, and the end of text."""
    texts = [f" {instance.target}" for instance in instances]
    tokens = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_target_length - 1)
    answers = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokens.input_ids]
    labels = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)
    return labels, np.array([len(answer) for answer in answers])


def _labels(instances: list[Instance], label2id: dict[str, int]) -> Tensor:
    if len(label2id) != 1:
        return torch.tensor([class_index(instance, label2id) for instance in instances])
    for instance in instances:
        if isinstance(instance.target, str):
            raise DataError(f"instance {instance.id}: the backbone gives a score, but the label is {instance.target!r}")
    return torch.tensor([float(instance.target) for instance in instances])


def class_index(instance: Instance, label2id: dict[str, int]) -> int:
    """The class index of an instance's label.

    Raises:
        DataError: If the label is none of the classes.
    """
    target = instance.target
    if isinstance(target, str) and target in label2id:
        return label2id[target]
    if isinstance(target, int) and target < len(label2id):
        return target
    raise DataError(
        f"instance {instance.id}: label {target!r} is none of the backbone's {len(label2id)} classes: "
        f"{', '.join(map(str, label2id))}"
    )
