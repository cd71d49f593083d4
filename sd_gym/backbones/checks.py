"""Checks of a loaded backbone, made before anything runs on it."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sd_gym.backbones.heads import Head
from sd_gym.config import BackboneConfig
from sd_gym.errors import BackboneError, one_line, short
from sd_gym.switch.architectures import Architecture

INVENTED = {"▁"}  # the only word of some tokenizers without files, apart from special tokens


def check_weights(
    name: str, model: PreTrainedModel, architecture: Architecture, info: dict[str, Any], *, new_head: bool
) -> None:
    """Raise BackboneError if weights outside a ``new_head`` are missing, layers are unread, or values are not finite.

    ``info`` is what ``from_pretrained(..., output_loading_info=True)`` returns.
    """
    other_size = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    random = sorted({*info["missing_keys"], *other_size} - (_head_keys(model, architecture) if new_head else set()))
    if random:
        raise BackboneError(
            f"the backbone {name!r}: {len(random)} weights of the {type(model).__name__} that config.json describes "
            f"are missing or of another size, such as {random[0]!r}; expected those of the whole model, as "
            "save_pretrained() writes them ('sd-gym prepare' makes a head where only that is missing)"
        )
    for stack in architecture.stacks:
        path = re.compile(rf"(?:^|\.){re.escape(stack.layers)}\.(\d+)\.")
        unread = [int(match[1]) + 1 for key in info["unexpected_keys"] if (match := path.search(key))]
        count, stored = len(stack.layers_in(model)), max(unread, default=0)
        if stored > count:
            raise BackboneError(
                f"the backbone {name!r}: config.json describes {count} layers of the {stack.name}, but the weights "
                f"have {stored}; correct config.json, or save the smaller model with save_pretrained()"
            )
    broken = [key for key, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise BackboneError(
            f"the backbone {name!r}: {len(broken)} of its weights hold NaN or infinity, such as {broken[0]!r}; take an "
            "earlier checkpoint, or train it again with a lower learning rate"
        )


def _head_keys(model: PreTrainedModel, architecture: Architecture) -> set[str]:
    """The heads' parameters: all outside the base model, and those of the modules that the architecture names."""
    inside = set() if model.base_model is model else {id(parameter) for parameter in model.base_model.parameters()}
    heads = {*architecture.token_heads, *architecture.sequence_heads}
    return {
        key
        for key, parameter in model.named_parameters()
        if key.rpartition(".")[0] in heads or (inside and id(parameter) not in inside)
    }


def check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BackboneError unless a tokenizer has words with embeddings, a longest input, and a padding token."""
    vocabulary = tokenizer.get_vocab()
    # Without files the library invents a tokenizer of special tokens.
    if not vocabulary.keys() - set(tokenizer.all_special_tokens) - INVENTED:
        raise BackboneError(
            f"the backbone {name!r}: its tokenizer has no files, so it has no words; expected them beside the "
            "weights, as tokenizer.save_pretrained() writes them"
        )
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or not longest >= 1:
        raise BackboneError(
            f"the backbone {name!r}: expected a number of tokens as model_max_length in tokenizer_config.json, got "
            f"{short(longest)}"
        )
    embeddings, last = model.get_input_embeddings().get_parameter("weight").shape[0], max(vocabulary.values())
    if last >= embeddings:
        raise BackboneError(
            f"the backbone {name!r}: its tokenizer has tokens up to id {last}, but the model has only {embeddings} "
            "embeddings; take the tokenizer that belongs to it, or call model.resize_token_embeddings() and train it"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise BackboneError(
            f"the backbone {name!r}: its tokenizer has neither a pad_token nor an eos_token; set one and save it again"
        )


def check_positions(
    backbone: BackboneConfig, positions: int | None, tokenizer: PreTrainedTokenizerBase, head: Head
) -> None:
    """Raise BackboneError if ``positions_of`` a model are too few for the longest inputs and targets."""
    if positions is None:
        return
    source = min(backbone.max_source_length, tokenizer.model_max_length)
    for what, tokens in head.positions(source, backbone.max_target_length).items():
        if tokens > positions:
            raise BackboneError(
                f"the backbone {backbone.name!r} has {positions} positions, but {what} is {tokens}; set it to "
                f"{positions} or less, or take a backbone with more positions"
            )


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model can read, if it has a table of positions; else ``None``."""
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and re.fullmatch("position_embeddings|embed_positions|wpe", path.split(".")[-1])
    ]
    # The first rows of some tables stand for padding.
    unused = [getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1) for table in tables]
    return min((table.num_embeddings - rows for table, rows in zip(tables, unused, strict=True)), default=None)


def usable_device(name: str) -> torch.device:
    """The device of a name; ValueError if this machine cannot compute on it."""
    try:
        device = torch.empty(1, device=name).fill_(1).device
        if device.type == "meta":
            raise ValueError("it cannot compute")
    except Exception as error:  # torch raises errors of many kinds
        raise ValueError(
            f"cannot use the device {name!r}: expected 'cpu', or one that torch has here, such as 'cuda' or 'cuda:1' "
            f"({one_line(error)})"
        ) from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether a device supports bfloat16 in hardware; on others it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older releases of torch
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
