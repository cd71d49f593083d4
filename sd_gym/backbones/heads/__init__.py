"""Heads: one file per kind of output. No other module depends on the kind of a model's answers."""

from transformers import PretrainedConfig, PreTrainedModel

from sd_gym.backbones.heads.base import Head, flops_share, reading_ratio
from sd_gym.backbones.heads.encoding import model_inputs
from sd_gym.backbones.heads.label import LabelHead
from sd_gym.backbones.heads.prompted import PromptedHead
from sd_gym.backbones.heads.score import ScoreHead
from sd_gym.backbones.heads.seq2seq import Seq2SeqHead
from sd_gym.backbones.heads.span import SpanHead

# The first head that fits a model is used.
HEADS: tuple[type[Head], ...] = (PromptedHead, Seq2SeqHead, SpanHead, ScoreHead, LabelHead)

__all__ = [
    "HEADS",
    "Head",
    "LabelHead",
    "PromptedHead",
    "ScoreHead",
    "Seq2SeqHead",
    "SpanHead",
    "flops_share",
    "head_of",
    "model_inputs",
    "reading_ratio",
    "stored_head",
]


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model that was loaded."""
    return next(head for kind in HEADS if (head := kind.of_model(model)) is not None)


def stored_head(config: PretrainedConfig, architectures: list[str], *, generates: bool = False) -> type[Head] | None:
    """The head of a stored model, by the names of its classes (``architectures``); ``None``: no head.

    ``generates``: whether a model generates texts if its class names do not tell, as in GGUF files.
    """
    candidates = (architectures, ["ForCausalLM"] if generates else [])
    return next((head for names in candidates for head in HEADS if head.is_stored(config, names)), None)
