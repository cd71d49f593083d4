"""Encoded data on disk: tokenising a large data set takes a minute, reading its tensors almost none.

There is one safetensors file per split, in the folder that the environment variable ``SD_GYM_CACHE`` names, or in
``~/.cache/sd_gym``. Its name is a hash of the texts, the tokenizer and the lengths. The file also holds a hash of its
name and tensors, so a changed, cut off or renamed file is written again. The folder may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.heads import Head
from sd_gym.backbones.load import hash_of_tensors
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded
from sd_gym.data.instance import Instance
from sd_gym.files import read_tensors, write_tensors
from sd_gym.tasks.encoding import encode
from sd_gym.version import __version__

OF_BACKBONE = ("max_source_length", "max_target_length", "prompt", "stop")  # the config keys that encoding depends on
ARRAYS = ("source_length", "target_length", "source_cut", "target_cut")  # fields that are arrays, not tensors
RULES = 4  # of encoding; another number where ``encode`` gives other tensors than before
SMALLEST = 2000  # instances; fewer are encoded as fast as they are read


def encode_cached(
    instances: Sequence[Instance], tokenizer: Tokenizer, head: Head, backbone: BackboneConfig, unanswerable: bool = True
) -> Encoded:
    """``sd_gym.tasks.encoding.encode``, read from the cache if it is there."""
    if len(instances) < SMALLEST or not tokenizer.is_fast:
        return encode(instances, tokenizer, head, backbone, unanswerable=unanswerable)
    settings = {key: getattr(backbone, key) for key in OF_BACKBONE} | {"unanswerable": unanswerable, **head.settings}
    folder = os.path.expanduser(os.environ.get("SD_GYM_CACHE") or "~/.cache/sd_gym")
    if folder.startswith("~"):  # there is no home
        return encode(instances, tokenizer, head, backbone, unanswerable=unanswerable)
    file = Path(folder, f"{_key(instances, tokenizer, settings)}.safetensors")
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or it is damaged
        tensors = read_tensors(file)
        if torch.equal(tensors.pop("hash", torch.empty(0)), _hash(tensors, file)):
            return _from_tensors(tensors)
    encoded = encode(instances, tokenizer, head, backbone, unanswerable=unanswerable)
    with contextlib.suppress(OSError):  # then there is no cache
        tensors = _to_tensors(encoded)
        write_tensors(file, {**tensors, "hash": _hash(tensors, file)})
    return encoded


def _key(instances: Sequence[Instance], tokenizer: Tokenizer, settings: dict[str, Any]) -> str:
    fast: Any = tokenizer  # the base class does not have a backend
    described = json.loads(fast.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left there by the last call
        described.pop(state)
    versions = [RULES, __version__, tokenizers.__version__, tokenizer.model_max_length, tokenizer.model_input_names]
    versions += [tokenizer.truncation_side, tokenizer.pad_token_id, tokenizer.eos_token_id]
    versions += [tokenizer.split_special_tokens]
    # The backend has the target's language only while targets are read.
    versions += [getattr(tokenizer, language, None) for language in ("src_lang", "tgt_lang")]
    digest = hashlib.sha256(json.dumps([versions, described, settings], sort_keys=True).encode())
    keys = ("source", "source_pair", "target", "more_targets", "protected", "answer_spans")
    for instance in instances:
        names = getattr(instance.target, "names", None)  # of a hub data set's classes
        digest.update(json.dumps([*(getattr(instance, key) for key in keys), names]).encode())
    return digest.hexdigest()


def _to_tensors(encoded: Encoded) -> dict[str, Tensor]:
    """All fields as tensors, whole numbers as int32 to save space."""
    tensors = {name: torch.as_tensor(value) for name, value in vars(encoded).items() if value is not None}
    return {name: value.int() if value.dtype == torch.int64 else value for name, value in tensors.items()}


def _from_tensors(tensors: dict[str, Tensor]) -> Encoded:
    long = {name: v.long() for name, v in tensors.items() if v.dtype == torch.int32 and name != "offsets"}
    fields: dict[str, Any] = tensors | long
    return Encoded(**fields | {name: fields[name].numpy() for name in ARRAYS})


def _hash(tensors: dict[str, Tensor], file: Path) -> Tensor:
    return torch.frombuffer(bytearray(hash_of_tensors(tensors, file.name)), dtype=torch.uint8)
