"""Instances as tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sd_gym.backbones.load import Output
from sd_gym.errors import short
from sd_gym.tasks.files import DataError
from sd_gym.tasks.instance import Instance
from sd_gym.tasks.metrics import IGNORED


@dataclass(frozen=True)
class Encoded:
    """A whole split as padded tensors; batches are cut out of it.

    Attributes:
        input_ids: int64 ``[n, longest source]``, padded at the right.
        source_length: int64 ``[n]``, tokens of each input.
        labels: int64 ``[n, longest target]`` padded with -100 where the backbone generates; class indices ``[n]`` where
            it classifies; scores float32 ``[n]`` where it has a single output (regression); first and last tokens of
            the right answers, int64 ``[n, most answers, 2]`` padded with -100, where it extracts.
        target_length: int64 ``[n]``, tokens of each target; 1 where nothing is generated.
        source_cut: bool ``[n]``, whether the input was longer than the limit.
        target_cut: bool ``[n]``, whether the target was; where answers are extracted, whether all right ones stood in
            what was cut off (then there is no label: the likelihood is 0, and training passes over it).
        token_type_ids: int64 like ``input_ids`` for sentence pairs, else ``None``.
        context_mask: bool like ``input_ids`` where answers are extracted, else ``None``: where they may begin and end.
        offsets: int32 ``[n, longest source, 2]``, likewise: the characters of the text that each token is.
    """

    input_ids: Tensor
    source_length: np.ndarray
    labels: Tensor
    target_length: np.ndarray
    source_cut: np.ndarray
    target_cut: np.ndarray
    token_type_ids: Tensor | None = None
    context_mask: Tensor | None = None
    offsets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def counts(self) -> dict[str, int]:
        """How many instances there are, and how many of their inputs and targets were cut."""
        return {
            "instances": len(self),
            "cut_inputs": int(self.source_cut.sum()),
            "cut_targets": int(self.target_cut.sum()),
        }

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
        if self.context_mask is not None:
            inputs["context_mask"] = self.context_mask[rows, :longest]
        labels = self.labels[rows]
        if labels.ndim == 2:
            labels = labels[:, : int(self.target_length[indices].max())].contiguous()
        inputs["labels"] = labels
        return {key: value.to(device) for key, value in inputs.items()}

    def part(self, indices: NDArray) -> Encoded:
        """Some instances alone, ``[m]``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Encoded(**{name: None if value is None else value[indices] for name, value in values.items()})

    def span_texts(self, indices: NDArray, spans: NDArray, contexts: Sequence[str]) -> list[str]:
        """The original text of each span ``[n, 2]`` of tokens; empty where it is the first token, no answer.

        Args:
            indices: Of the instances, ``[n]``.
            spans: First and last token of each.
            contexts: Their contexts.
        """
        offsets = self.offsets.numpy()
        begin, end = offsets[indices, spans[:, 0], 0], offsets[indices, spans[:, 1], 1]
        places = zip(contexts, begin.tolist(), end.tolist(), (spans[:, 0] > 0).tolist(), strict=True)
        return [context[first:last].strip() if answered else "" for context, first, last, answered in places]


def left_padded(values: Tensor, length: Tensor) -> Tensor:
    """``values [n, longest]``, padded at the right, with the padding at the left; ``length`` is ``[n, 1]``."""
    longest = values.shape[1]
    return values.gather(1, (torch.arange(longest) - longest + length) % longest)


def encode(
    instances: Sequence[Instance],
    tokenizer: PreTrainedTokenizerBase,
    *,
    output: Output,
    max_source_length: int,
    max_target_length: int,
    label2id: dict[str, int] | None = None,
    prompt: str | None = None,
    stop: str | None = None,
    unanswerable: bool = True,
) -> Encoded:
    """Tokenise instances; what is longer than the limits is cut: of a question and its context only the context.

    Args:
        instances: What to encode.
        tokenizer: The backbone's tokenizer.
        output: What the backbone gives.
        max_source_length: Longest input, in tokens.
        max_target_length: Longest target, in tokens.
        label2id: Class indices of label words, for backbones that classify.
        prompt: For decoder-only backbones, what the input is put into: ``{source}`` and, for question answering,
            ``{source_pair}`` (the context) are filled in; it is never cut.
        stop: What ends an answer to a prompt; ``None``: the tokenizer's end of text.
        unanswerable: Whether questions may be without answer, for backbones that extract.

    Raises:
        DataError: If a label is none of the backbone's classes, a question leaves no room for its context, or an answer
            that shall be extracted does not stand in its context.
    """
    source, source_cut = _tokenize_sources(
        instances, tokenizer, max_source_length, prompt, return_offsets_mapping=output == "span"
    )
    context_mask = offsets = None
    target_length, target_cut = np.ones(len(instances), dtype=np.int64), np.zeros(len(instances), dtype=bool)
    if output == "span":
        offsets = source.offset_mapping.int()
        context_mask = _context_mask(source, len(instances))
        labels, target_cut = _spans(instances, context_mask.numpy(), offsets.numpy())
        context_mask[:, 0] = unanswerable
    elif prompt is not None:
        labels, target_length, target_cut = _answers(instances, tokenizer, max_target_length, stop)
    elif output == "text":
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
        target_cut = _was_cut(targets, max_target_length)
    else:
        labels = _labels(instances, label2id or {})
    return Encoded(
        input_ids=source.input_ids,
        source_length=source.attention_mask.sum(dim=1).numpy(),
        labels=labels,
        target_length=target_length,
        source_cut=source_cut,
        target_cut=target_cut,
        token_type_ids=source.get("token_type_ids") if any(one.source_pair is not None for one in instances) else None,
        context_mask=context_mask,
        offsets=offsets,
    )


def _context_mask(source: BatchEncoding, n: int) -> Tensor:
    """The context's tokens, bool ``[n, longest]``."""
    # None (of special tokens and padding) becomes NaN.
    parts = np.stack([np.array(source.sequence_ids(row), dtype=np.float32) for row in range(n)])
    return torch.from_numpy(parts == 1)


def _spans(instances: Sequence[Instance], context_mask: NDArray, offsets: NDArray) -> tuple[Tensor, NDArray]:
    """First and last tokens of the right answers, and whether none of them is left: see ``Encoded``."""
    spans, cut = [], np.zeros(len(instances), dtype=bool)
    for row, instance in enumerate(instances):
        if not instance.references:
            spans.append([[0, 0]])
            continue
        tokens = np.nonzero(context_mask[row])[0]
        begin, end = offsets[row, tokens, 0], offsets[row, tokens, 1]
        found = []
        for first, last in _places(instance):
            # Ends and beginnings ascend: the first token that ends behind the answer's beginning, and so on.
            span = [np.searchsorted(end, first, side="right"), np.searchsorted(begin, last) - 1]
            if span[0] <= span[1] < len(tokens) and end[span[1]] >= last:
                found.append([int(tokens[place]) for place in span])
        cut[row] = not found
        spans.append(found or [[IGNORED, IGNORED]])
    most = max(map(len, spans))
    padded = [one + [[IGNORED, IGNORED]] * (most - len(one)) for one in spans]
    return torch.tensor(padded), cut


def _places(instance: Instance) -> list[tuple[int, int]]:
    """Where the right answers stand: where the data say so, else wherever their texts occur.

    Raises:
        DataError: If they occur nowhere.
    """
    context, references = instance.source_pair, instance.references
    places = [(start, end) for start, end in instance.answer_spans if context[start:end] in references]
    if not places:
        places = [match.span() for text in references for match in re.finditer(re.escape(text), context)]
    if not places:
        raise DataError(
            f"{instance.place}: the answer {short(references[0])} does not stand in its context, so it cannot be "
            "extracted; a backbone that generates could answer"
        )
    return places


def droppable_tokens(
    instances: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, max_source_length: int, prompt: str | None = None
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
    tokens, _ = _tokenize_sources(instances, tokenizer, max_source_length, prompt, **wanted)
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


def texts_and_tokens(
    instance: Instance, tokenizer: PreTrainedTokenizerBase, max_source_length: int, prompt: str | None = None
) -> tuple[list[str], NDArray | None]:
    """The texts that an instance's input is made of, and where its tokens stand in them; tokenised as ``encode`` does.

    Returns:
        The source and its pair, or the prompt with both in it; and of each token (which of the texts, first character,
        last character + 1), int64 ``[length, 3]``, the first -1 for special tokens; ``None`` of slow tokenizers, which
        cannot tell.
    """
    if prompt is not None:
        texts, _ = _prompts([instance], tokenizer, min(max_source_length, tokenizer.model_max_length), prompt)
    else:
        texts = [instance.source] + ([] if instance.source_pair is None else [instance.source_pair])
    if not tokenizer.is_fast:
        return texts, None
    tokens, _ = _tokenize_sources([instance], tokenizer, max_source_length, prompt, return_offsets_mapping=True)
    number = [-1 if sequence is None else sequence for sequence in tokens.sequence_ids(0)]
    return texts, np.column_stack([number, tokens.offset_mapping[0].numpy()])


def _tokenize_sources(
    instances: Sequence[Instance],
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    prompt: str | None,
    **wanted: bool,
) -> tuple[BatchEncoding, NDArray]:
    """The inputs' tokens, and which inputs were cut, bool ``[n]``."""
    limit = min(max_source_length, tokenizer.model_max_length)
    padding = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    if prompt is not None:
        prompts, cut = _prompts(instances, tokenizer, limit, prompt)
        return tokenizer(prompts, **padding, **wanted), cut
    sources, pairs = [one.source for one in instances], [one.source_pair for one in instances]
    paired = any(pair is not None for pair in pairs)
    # What must not be dropped must not be cut either: a question stays whole.
    asked = paired and all(one.protected for one in instances)
    if asked:
        for instance, ids in zip(instances, tokenizer(sources, [""] * len(sources)).input_ids, strict=True):
            if len(ids) >= limit:
                raise DataError(
                    f"{instance.place}: the question alone has {len(ids)} of max_source_length {limit} tokens"
                )
    tokens = tokenizer(
        sources,
        [pair or "" for pair in pairs] if paired else None,
        truncation="only_second" if asked else True,
        max_length=limit,
        **padding,
        **wanted,
    )
    return tokens, _was_cut(tokens, limit)


def _was_cut(tokens: BatchEncoding, limit: int) -> NDArray:
    """Which texts were longer than the limit, bool ``[n]``; slow tokenizers only tell which ones reach it."""
    if tokens.encodings is None:
        return (tokens.attention_mask.sum(dim=1) >= limit).numpy()
    return np.array([bool(one.overflowing) for one in tokens.encodings])


def _document(instance: Instance) -> str:
    """The field of a prompt that may be long: the context of a question, else the source."""
    return "source" if instance.source_pair is None else "source_pair"


def _prompts(
    instances: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, limit: int, prompt: str
) -> tuple[list[str], NDArray]:
    """Each instance's prompt, its document cut so that the whole has about ``limit`` tokens; and which were cut.

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
    texts, cut = [], []
    for instance, document, taken, places in zip(instances, documents, used, offsets, strict=True):
        room = limit - taken
        if room < 1:
            raise DataError(f"{instance.place}: the prompt alone has {taken} of max_source_length {limit} tokens")
        cut.append(len(places) > room)
        text = document[: places[room - 1][1]] if cut[-1] else document
        texts.append(prompt.format(**{"source": instance.source, _document(instance): text}))
    return texts, np.array(cut)


def _answers(
    instances: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, max_target_length: int, stop: str | None
) -> tuple[Tensor, NDArray, NDArray]:
    """What a decoder-only backbone shall say behind the prompt: a space, the target, and what ends it."""
    end = [tokenizer.eos_token_id] if stop is None else tokenizer(stop, add_special_tokens=False).input_ids
    room = max_target_length - len(end)
    if room < 1:
        raise DataError(f"expected max_target_length above {len(end)}, the tokens of the stop, got {max_target_length}")
    tokens = tokenizer([f" {instance.target}" for instance in instances], add_special_tokens=False).input_ids
    answers = [torch.tensor([*ids[:room], *end]) for ids in tokens]
    labels = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)
    return labels, np.array([len(answer) for answer in answers]), np.array([len(ids) > room for ids in tokens])


def _labels(instances: Sequence[Instance], label2id: dict[str, int]) -> Tensor:
    if len(label2id) != 1:
        return torch.tensor([class_index(instance, label2id) for instance in instances])
    for instance in instances:
        if isinstance(instance.target, str):
            raise DataError(f"{instance.place}: the backbone gives a score, but the label is {short(instance.target)}")
    return torch.tensor([float(instance.target) for instance in instances])


def class_index(instance: Instance, label2id: dict[str, int]) -> int:
    """The class index of an instance's label.

    Raises:
        DataError: If the label is none of the classes.
    """
    target = instance.target
    if str(target) in label2id:  # a number that is a class's name is that class
        return label2id[str(target)]
    if isinstance(target, int) and target < len(label2id):
        return target
    raise DataError(
        f"{instance.place}: label {short(target)} is none of the backbone's {len(label2id)} classes: "
        f"{', '.join([*label2id][:20])}{' ...' if len(label2id) > 20 else ''}"
    )
