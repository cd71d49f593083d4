"""Loading a backbone: bundled, from a local folder, or from the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sd_gym.switch import FlopsModel, Switchboard
from sd_gym.switch.architectures import architecture_of

BUNDLED = {"mini": Path(__file__).parent / "mini"}


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model with its tokenizer, switchboard and FLOPs.

    Attributes:
        name: What it was loaded as.
        model: In evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        board: Its switchboard.
        flops: Its FLOPs as a function of lengths and decisions.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    board: Switchboard
    flops: FlopsModel

    @property
    def generates(self) -> bool:
        """Whether it generates its answers rather than classifying."""
        return self.model.can_generate()

    @property
    def causal(self) -> bool:
        """Whether it is a decoder only, which reads a prompt and goes on with it."""
        return self.generates and self.board.architecture.causal

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of one forward pass, teacher-forced where the backbone generates (``labels`` are in the inputs).

        Returns:
            ``[batch, target length, vocabulary]`` or ``[batch, classes]``.
        """
        if self.causal:
            return self._continuation(**inputs)
        if self.generates:
            return self.model(**inputs, use_cache=False).logits
        return self.model(**{key: value for key, value in inputs.items() if key != "labels"}).logits

    def _continuation(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Logits of the labels behind prompts that are padded at the left."""
        given = labels[:, :-1]  # nothing follows the last one
        input_ids = torch.cat([input_ids, given.clamp(min=0)], dim=1)
        mask = torch.cat([attention_mask, (given >= 0).long()], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        keep = labels.shape[1]
        return self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
        ).logits


def resolve(name: str) -> str:
    """The folder or hub id that a backbone's name stands for.

    Raises:
        FileNotFoundError: If the name looks like a path and there is no such folder.
    """
    if name in BUNDLED:
        return str(BUNDLED[name])
    if Path(name).is_dir() or (name.endswith(".gguf") and Path(name).is_file()):
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise FileNotFoundError(
            f"no backbone folder at {name!r}; expected a folder with config.json and model.safetensors, a .gguf file, "
            f"a hub id such as 'facebook/bart-base', or one of the bundled: {', '.join(BUNDLED)}"
        )
    return name


def load_model(name: str, *, num_labels: int | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of a supported architecture and its tokenizer; weights only as safetensors, no remote code.

    Args:
        name: Bundled name, local folder, ``.gguf`` file, or hub id.
        num_labels: Put a classification head of that size on the model, new where the stored model has none of
            that size; ``None``: load the head that was stored.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub does not have it or cannot be reached.
        UnsupportedArchitectureError: If no switches are known for the architecture.
        ValueError: If the stored model has no head and none is asked for.
    """
    path, file = resolve(name), {}
    if path.endswith(".gguf"):
        file = {"gguf_file": Path(path).name}
        path = str(Path(path).parent)
    try:
        config = AutoConfig.from_pretrained(path, **file)
    except OSError as error:
        raise FileNotFoundError(
            f"cannot load the backbone {name!r}: it is no local folder, and the Hugging Face hub did not give it. "
            "Without network, pass the path of a local copy as backbone=..."
        ) from error
    architecture_of(config.model_type)
    heads = " ".join(config.architectures or [])
    if num_labels is not None:
        model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=num_labels, use_safetensors=True, ignore_mismatched_sizes=True
        )
    elif "ForConditionalGeneration" in heads:
        model = AutoModelForSeq2SeqLM.from_pretrained(path, use_safetensors=True)
    elif "ForCausalLM" in heads or "LMHeadModel" in heads or file:
        weights = file or {"use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(path, **weights)
    elif "ForSequenceClassification" in heads:
        model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True)
    else:
        raise ValueError(
            f"the backbone {name!r} ({heads or config.model_type}) has no task head; fine-tune one with "
            f"'sd-gym prepare --backbone {name} --dataset DATA --output FOLDER' and use that folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, **file)
    if tokenizer.pad_token is None:  # padding is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def save_backbone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer as Hugging Face does; each file appears complete or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration comes last: a folder that has it is complete.
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    temporary.rmdir()


@lru_cache(maxsize=4)
def load_backbone(name: str, device: str = "cpu") -> Backbone:
    """Load a frozen backbone, ready to be switched; loaded once a process, since it never changes.

    Raises:
        As ``load_model``.
    """
    model, tokenizer = load_model(name)
    model = model.to(device).eval().requires_grad_(False)
    board = Switchboard(model)
    return Backbone(name, model, tokenizer, board, FlopsModel(board))
