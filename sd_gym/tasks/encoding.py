"""Instances as tensors."""

from collections.abc import Sequence
from threading import RLock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BatchEncoding
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.heads import Head
from sd_gym.backbones.heads.seq2seq import was_cut
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded
from sd_gym.data.instance import Instance
from sd_gym.errors import DataError, no_context, short

# A fast tokenizer keeps its truncation and padding from call to call, so threads must take turns.
TOKENIZING = RLock()
JOINED = 4  # a filled prompt may have fewer tokens than prompt and document alone; more than these are rare
PADDED = {"padding": True, "padding_side": "right", "return_tensors": "pt"}


def encode(
    instances: Sequence[Instance], tokenizer: Tokenizer, head: Head, backbone: BackboneConfig, unanswerable: bool = True
) -> Encoded:
    """Tokenise instances. Texts longer than the limits are cut; questions are not, only their contexts.

    ``backbone`` (from ``Head.prompting``) has lengths, prompt and stop. ``unanswerable``: whether "no answer" may be
    extracted.

    Raises:
        DataError: If a label is not one of the backbone's classes, a question leaves no room for its context, an answer
            to be extracted is not in its context, or there must be one and the context has no token.
    """
    with TOKENIZING:
        source, source_cut = _tokenize_sources(instances, tokenizer, backbone, **head.source_options)
        targets = head.targets(instances, source, tokenizer, backbone)
    if targets.context_mask is not None:
        targets.context_mask[:, 0] = unanswerable  # the first token stands for "no answer"
        for row in (~targets.context_mask.any(dim=1)).nonzero()[:, 0].tolist():
            raise DataError(f"{instances[row].place}: {no_context(instances[row].source_pair)}")
    return Encoded(
        input_ids=source.input_ids,
        source_length=source.attention_mask.sum(dim=1).numpy(),
        source_cut=source_cut,
        token_type_ids=source.get("token_type_ids") if any(map(_is_pair, instances)) else None,
        **vars(targets),
    )


def droppable_tokens(instances: Sequence[Instance], tokenizer: Tokenizer, backbone: BackboneConfig) -> NDArray:
    """Which tokens of the inputs, as encoded by ``encode``, may be dropped: bool ``[n, longest source]``.

    Special tokens, padding, protected parts of an instance, and all of a prompt but its document may not.

    Raises:
        ValueError: If the tokenizer is slow: it does not give the characters of its tokens.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"dropping tokens needs a fast tokenizer, got {type(tokenizer).__name__}")
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    with TOKENIZING:
        tokens, _ = _tokenize_sources(instances, tokenizer, backbone, **options)
        added = torch.tensor(tokenizer("", "").input_ids, dtype=torch.int64)
    # Those that a text itself has look the same to an attached policy, which sees tokens alone.
    droppable = ((tokens.special_tokens_mask == 0) & ~torch.isin(tokens.input_ids, added)).numpy()
    start, end = tokens.offset_mapping.numpy()[..., 0], tokens.offset_mapping.numpy()[..., 1]
    for row, instance in enumerate(instances):
        first = np.array([number == 0 for number in tokens.sequence_ids(row)])
        protected, shift = instance.protected, 0
        if backbone.prompt is not None:
            field = _document(instance)
            before, _, after = backbone.prompt.partition(f"{{{field}}}")
            shift = len(before.format(source=instance.source))
            last = end[row].max() - len(after.format(source=instance.source))
            droppable[row] &= (start[row] >= shift) & (end[row] <= last)
            protected = protected if field == "source" else ()
        for begin, stop in protected:
            droppable[row] &= ~(first & (start[row] < stop + shift) & (end[row] > begin + shift))
    return droppable


def texts_and_tokens(
    instance: Instance, tokenizer: Tokenizer, backbone: BackboneConfig
) -> tuple[list[str], NDArray | None]:
    """The source and its pair, or the filled prompt, and the place of each token of ``encode`` in these texts.

    A place is the text's index (-1 for special tokens), the first character, and the last character + 1:
    int64 ``[length, 3]``; ``None`` for slow tokenizers.
    """
    texts = [instance.source] + ([] if instance.source_pair is None else [instance.source_pair])
    options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    with TOKENIZING:
        if backbone.prompt is not None:
            texts, tokens, _ = _tokenize_prompts([instance], tokenizer, backbone, backbone.prompt, **options)
        else:
            tokens, _ = _tokenize_sources([instance], tokenizer, backbone, **options)
    if not tokenizer.is_fast:
        return texts, None
    text_index = [-1 if index is None else index for index in tokens.sequence_ids(0)]
    return texts, np.column_stack([text_index, tokens.offset_mapping[0].numpy()])


def _tokenize_sources(
    instances: Sequence[Instance], tokenizer: Tokenizer, backbone: BackboneConfig, **options: Any
) -> tuple[BatchEncoding, NDArray]:
    """The inputs' tokens, and which inputs were cut, bool ``[n]``."""
    if backbone.prompt is not None:
        _, tokens, cut = _tokenize_prompts(instances, tokenizer, backbone, backbone.prompt, **options)
        return tokens, cut
    limit = min(backbone.max_source_length, tokenizer.model_max_length)
    has_questions = all(instance.protected and instance.source_pair is not None for instance in instances)
    if has_questions:  # they are not cut
        questions: Any = [(instance.source, "") for instance in instances]
        for instance, ids in zip(instances, tokenizer(questions).input_ids, strict=True):
            if len(ids) >= limit:
                raise DataError(
                    f"{instance.place}: the question alone has {len(ids)} of max_source_length {limit} tokens"
                )
    # Texts beside pairs, which the annotation of transformers does not know.
    texts: Any = [(one.source, one.source_pair) if _is_pair(one) else one.source for one in instances]
    options |= {"truncation": "only_second" if has_questions else True, "max_length": limit}
    tokens = tokenizer(texts, **PADDED, **options)
    for row in (tokens.attention_mask.sum(dim=1) == 0).nonzero()[:, 0].tolist():
        raise DataError(f"{instances[row].place}: the tokenizer has no token for {short(instances[row].source)}")
    return tokens, was_cut(tokens, limit)


def _is_pair(instance: Instance) -> bool:
    return instance.source_pair is not None


def _document(instance: Instance) -> str:
    """The field of a prompt that may be cut: the context of a question, else the source."""
    return "source_pair" if _is_pair(instance) else "source"


def _tokenize_prompts(
    instances: Sequence[Instance], tokenizer: Tokenizer, backbone: BackboneConfig, prompt: str, **options: Any
) -> tuple[list[str], BatchEncoding, NDArray]:
    """Each instance's prompt, its document cut so that the whole fits; its tokens; and which were cut, bool ``[n]``."""
    limit = min(backbone.max_source_length, tokenizer.model_max_length)
    documents = [getattr(instance, _document(instance)) for instance in instances]
    without = [_filled(prompt, instance, "") for instance in instances]
    different = list(dict.fromkeys(without))  # one, unless it has a question
    alone = dict(zip(different, map(len, tokenizer(different).input_ids), strict=True))
    for instance, text in zip(instances, without, strict=True):
        if alone[text] >= limit:
            raise DataError(f"{instance.place}: the prompt alone has {alone[text]} of max_source_length {limit} tokens")
    places = tokenizer(documents, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    length, room = np.array([len(own) for own in places]), limit - np.array([alone[text] for text in without])
    room = np.where(length <= room + JOINED, length, room)  # whatever may fit is tried whole
    while True:
        texts = [
            _filled(prompt, instance, _beginning(document, own, tokens))
            for instance, document, own, tokens in zip(instances, documents, places, room.tolist(), strict=True)
        ]
        tokens = tokenizer(texts, **PADDED, **options)
        # Where prompt and document meet, there may be other tokens than those of each alone.
        over = (tokens.attention_mask.sum(dim=1).numpy() - limit).clip(min=0)
        if not over.any():
            return texts, tokens, length > room
        room = np.where(over > 0, np.minimum(room, length) - over, room)


def _filled(prompt: str, instance: Instance, document: str) -> str:
    """The prompt with an instance's texts and the beginning of its document."""
    if not _is_pair(instance) and "{source_pair}" in prompt:
        raise DataError(f"{instance.place}: the prompt names {{source_pair}}, and there is only one text")
    if f"{{{_document(instance)}}}" not in prompt or (instance.source_pair and "{source}" not in prompt):
        expected = f"the prompt must name {{source}} (and {{source_pair}}, for a context), got {prompt!r}"
        raise DataError(f"{instance.place}: {expected}")
    return prompt.format(**{"source": instance.source, _document(instance): document})


def _beginning(document: str, places: list[tuple[int, int]], tokens: int) -> str:
    """The first characters of a document, which are whole in at most so many ``tokens``; ``places``: of each token."""
    if tokens >= len(places):
        return document
    # A character may have several tokens, each with the place of the whole.
    return document[: min(places[tokens][0], places[tokens - 1][1])] if tokens > 0 else ""
