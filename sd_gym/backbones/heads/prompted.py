"""Heads that generate a text, by a decoder-only model that continues a prompt."""

from collections.abc import Callable, Sequence
from string import Formatter
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.heads.seq2seq import Seq2SeqHead, padded_targets
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Targets
from sd_gym.data.instance import Instance
from sd_gym.errors import DataError
from sd_gym.switch import Switchboard
from sd_gym.switch.architectures import architecture_of

ANCHOR = "x"  # stands for the text that a prompt ends with


class PromptedHead(Seq2SeqHead):
    """A ``Seq2SeqHead`` whose answer follows the prompt in one pass.

    Prompts are padded at the left, so that all answers begin at the same position.
    """

    name = "prompted"
    _auto_class = "AutoModelForCausalLM"
    padding_side = "left"

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self | None:
        """Any generating model without an encoder."""
        return (
            super().of_model(model)
            if model.can_generate() and architecture_of(model.config.model_type).causal
            else None
        )

    @classmethod
    def is_stored(cls, config: PretrainedConfig, architectures: Sequence[str]) -> bool:
        """By the model's class, if it has no encoder."""
        return super().is_stored(config, architectures) and not config.is_encoder_decoder

    def prompting(self, backbone: BackboneConfig) -> BackboneConfig:
        """With prompt and stop; ValueError without a prompt, or if braces hold anything but text names, once each."""
        if backbone.prompt is None:
            raise ValueError("the backbone is decoder-only, so it needs a 'prompt', such as '{source}\\nLabel:'")
        expected = "expected {source} and {source_pair}, each once at most; write other braces twice: {{ and }}"
        try:
            parts = list(Formatter().parse(backbone.prompt))
        except ValueError as error:
            raise ValueError(f"config key 'backbone.prompt': {error}; {expected}") from error
        named = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
        for at, (name, spec, conversion) in enumerate(named):
            if name not in ("source", "source_pair") or spec or conversion or (name, spec, conversion) in named[:at]:
                raise ValueError(f"config key 'backbone.prompt': got {name!r}; {expected}")
        return backbone

    def targets(
        self, instances: Sequence[Instance], source: BatchEncoding, tokenizer: Tokenizer, backbone: BackboneConfig
    ) -> Targets:
        """The answer after the prompt: a space, the target up to a stop, and its end if known: the stop, or a token.

        After a prompt that ends in a space or a new line, as those of a chat do, there is no other space.
        """
        stop, prompt = backbone.stop or "", backbone.prompt or ""
        end = [] if stop else [tokenizer.eos_token_id]
        if end == [None]:
            raise DataError("the backbone's tokenizer has no token that ends a text; set 'stop', such as a new line")

        def tokens_of(texts: list[str]) -> list[list[int]]:
            return _following(_after_texts(prompt), texts, tokenizer)

        space, longest = "" if prompt[-1:].isspace() else " ", backbone.max_target_length
        targets = [str(instance.target).strip() for instance in instances]
        parts = [target.partition(stop) if stop else (target, "", "") for target in targets]
        own = [before.strip() for before, _, _ in parts]
        texts = [f"{space}{text}" if text else "" for text in own]
        last = [*_following(ANCHOR, [stop], tokenizer)[0], *end]
        room = longest - len(last)
        if room < 1:
            raise DataError(f"expected max_target_length above {len(last)}, the tokens of the stop, got {longest}")
        # An empty text keeps its end: an answer is compared in one token at least.
        known = zip(instances, parts, strict=True)
        endless = np.array([one.is_cut and text != "" and not found for one, (text, found, _) in known])
        whole = [[*ids, *end] for ids in tokens_of([f"{text}{stop}" for text in texts])]
        too_long = np.array([len(ids) > longest for ids in whole])
        unended = tokens_of(texts) if (endless | too_long).any() else whole
        answers = [
            ids[:longest] if has_no_end else [*ids[:room], *last] if is_long else ended
            for ids, ended, has_no_end, is_long in zip(unended, whole, endless, too_long, strict=True)
        ]
        stopped = np.array([after != "" for _, _, after in parts])
        return padded_targets(answers, endless | too_long | stopped)

    def forward(self, board: Switchboard, batch: dict[str, Tensor], call: Callable[..., Any] | None = None) -> Tensor:
        """See ``Head.forward``: the logits of the labels after the prompts."""
        answer = batch["labels"][:, :-1]  # the last token is only predicted
        input_ids = torch.cat([batch["input_ids"], answer.clamp(min=0)], dim=1)
        mask = torch.cat([batch["attention_mask"], (answer >= 0).long()], dim=1)
        return (call or board.model)(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=batch["labels"].shape[1],
            use_cache=False,
        ).logits

    def kept(self, batch: dict[str, Tensor], keep: NDArray | Tensor) -> NDArray | Tensor:
        """The kept tokens, and all of the answer."""
        return F.pad(torch.as_tensor(keep), (0, batch["labels"].shape[1] - 1), value=1)

    def lengths(self, source: NDArray, target: NDArray, kept: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """Prompt and answer in one pass, without the answer's last token."""
        return source + target - 1, target, kept + target - 1

    def positions(self, source: int, target: int) -> dict[str, int]:
        """Positions of prompt and answer together; the answer's last token is not read."""
        return {"max_source_length + max_target_length - 1": source + target - 1}

    def prompt_length(self, inputs: Tensor) -> int:
        """The prompt's tokens."""
        return inputs.shape[1]


def _after_texts(prompt: str) -> str:
    """What a prompt has after its last text, and a letter before it."""
    *_, last = Formatter().parse(prompt)
    return f"{ANCHOR}{'' if last[1] is not None else last[0]}"


def _following(before: str, texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of texts that follow another one, which may differ from those of each text alone.

    Many tokenizers write a space in front of a text, and one token for a full stop and the new line after it. Where
    the tokens of ``before`` would change, too, they are those of the text alone.
    """
    start = tokenizer(before, add_special_tokens=False).input_ids
    joined = tokenizer([f"{before}{text}" for text in texts], add_special_tokens=False).input_ids
    return [
        ids[len(start) :] if ids[: len(start)] == start else tokenizer(text, add_special_tokens=False).input_ids
        for ids, text in zip(joined, texts, strict=True)
    ]
