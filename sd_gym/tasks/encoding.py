"""Instances as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sd_gym.backbones.heads import Head
from sd_gym.backbones.heads.seq2seq import was_cut
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded
from sd_gym.data.instance import Instance
from sd_gym.errors import DataError


def encode(
    instances: Sequence[Instance],
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    backbone: BackboneConfig,
    *,
    unanswerable: bool = True,
) -> Encoded:
    """Tokenise instances; what is longer than the limits is cut: of a question and its context only the context.

    Args:
        instances: What to encode.
        tokenizer: The backbone's tokenizer.
        head: The backbone's head, which encodes the targets.
        backbone: Of the config, with what ``Head.prompting`` leaves of the prompt: lengths, prompt and stop count.
        unanswerable: Whether questions may be without answer, for backbones that extract.

    Raises:
        DataError: If a label is none of the backbone's classes, a question leaves no room for its context, or an answer
            that shall be extracted does not stand in its context.
    """
    source, source_cut = _tokenize_sources(instances, tokenizer, backbone, **head.source_options())
    targets = head.targets(instances, source, tokenizer, backbone, unanswerable=unanswerable)
    return Encoded(
        input_ids=source.input_ids,
        source_length=source.attention_mask.sum(dim=1).numpy(),
        source_cut=source_cut,
        token_type_ids=source.get("token_type_ids") if any(one.source_pair is not None for one in instances) else None,
        **vars(targets),
    )


def droppable_tokens(
    instances: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig
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
    tokens, _ = _tokenize_sources(instances, tokenizer, backbone, **wanted)
    droppable = (tokens.special_tokens_mask == 0).numpy()
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
    instance: Instance, tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig
) -> tuple[list[str], NDArray | None]:
    """The texts that an instance's input is made of, and where its tokens stand in them; tokenised as ``encode`` does.

    Returns:
        The source and its pair, or the prompt with both in it; and of each token (which of the texts, first character,
        last character + 1), int64 ``[length, 3]``, the first -1 for special tokens; ``None`` of slow tokenizers, which
        cannot tell.
    """
    if backbone.prompt is not None:
        limit = min(backbone.max_source_length, tokenizer.model_max_length)
        texts, _ = _prompts([instance], tokenizer, limit, backbone.prompt)
    else:
        texts = [instance.source] + ([] if instance.source_pair is None else [instance.source_pair])
    if not tokenizer.is_fast:
        return texts, None
    tokens, _ = _tokenize_sources([instance], tokenizer, backbone, return_offsets_mapping=True)
    number = [-1 if sequence is None else sequence for sequence in tokens.sequence_ids(0)]
    return texts, np.column_stack([number, tokens.offset_mapping[0].numpy()])


def _tokenize_sources(
    instances: Sequence[Instance],
    tokenizer: PreTrainedTokenizerBase,
    backbone: BackboneConfig,
    **wanted: bool,
) -> tuple[BatchEncoding, NDArray]:
    """The inputs' tokens, and which inputs were cut, bool ``[n]``."""
    limit = min(backbone.max_source_length, tokenizer.model_max_length)
    padding = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    if backbone.prompt is not None:
        prompts, cut = _prompts(instances, tokenizer, limit, backbone.prompt)
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
    return tokens, was_cut(tokens, limit)


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
