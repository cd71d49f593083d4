"""Which modules of a Hugging Face model are switches, one declarative entry per architecture.

An entry names attributes and nothing else: no model code is copied or patched. ``register_architecture`` adds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

SublayerKind = Literal["attention", "cross_attention", "feed_forward"]


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a layer.

    Attributes:
        kind: What it is; names the switch (``encoder.0.attention``).
        modules: Paths of the branch's modules inside the layer, in execution order, each one's output the next one's
            first input, such as a norm and an attention, or BART's ``fc1`` and ``fc2``.
        adds_residual: Whether the last module adds the branch's input itself, as BERT's output modules do. Then a
            skipped row passes through unchanged; otherwise it gets zeros and the layer's own residual sum passes it.
        output: Path of an attention's output projection inside the layer; the module of ``modules`` that holds it is
            the attention proper.
        source: Paths of the projections that read the encoder's output (keys and values of a cross-attention).
        position_bias: Path of the module whose ``compute_bias`` makes what the first layer shares with all others (T5's
            relative positions), as it must exist where the first layer is skipped.
    """

    kind: SublayerKind
    modules: tuple[str, ...]
    adds_residual: bool = False
    output: str | None = None
    source: tuple[str, ...] = ()
    position_bias: str | None = None

    @property
    def attention(self) -> str | None:
        """The module that is the attention proper; ``None`` in a feed-forward."""
        if self.output is None:
            return None
        return next(path for path in self.modules if self.output.startswith(path + "."))


@dataclass(frozen=True)
class Stack:
    """A list of equal layers.

    Attributes:
        name: ``encoder`` or ``decoder``. After an encoder, a decoder runs on the target; a lone stack of either name
            runs on the input.
        layers: Path of the layer list inside ``model.base_model``.
        sublayers: Residual branches of each layer, in execution order.
        whole: Whether a layer takes and returns the hidden states alone, unchanged where no sublayer runs (no norm
            follows a residual sum); then it is skipped as a whole.
        norms: Paths of all norms that follow residual sums, in execution order, of a layer that takes and returns the
            hidden states alone: where no sublayer runs, only they do.
    """

    name: str
    layers: str
    sublayers: tuple[Sublayer, ...]
    whole: bool = False
    norms: tuple[str, ...] = ()

    def layers_in(self, model: PreTrainedModel) -> nn.ModuleList:
        """The layers of a model."""
        return cast("nn.ModuleList", model.base_model.get_submodule(self.layers))


@dataclass(frozen=True)
class Architecture:
    """Where the switches of an architecture are, and which linears outside its layers always run.

    Attributes:
        model_types: Values of ``model.config.model_type`` that this entry is for.
        stacks: Layer stacks in execution order; the first reads the input.
        causal: Whether the first stack's positions see only earlier ones (decoder-only models).
        token_heads: Paths of linears that run once per target (or source) token, such as ``lm_head``.
        sequence_heads: Paths of linears that run once per sequence, such as a classifier.
            Paths that a model does not have are ignored, so one entry serves all heads.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    causal: bool = False
    token_heads: tuple[str, ...] = ()
    sequence_heads: tuple[str, ...] = ()


class UnsupportedArchitectureError(ValueError):
    """The model's architecture has no entry."""


_REGISTRY: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Make an architecture known under each of its model types; a later entry replaces an earlier one.

    Example:
        >>> from sd_gym.switch import Architecture, Stack, Sublayer, register_architecture
        >>> attention = Sublayer("attention", ("norm", "self_attn"), output="self_attn.out_proj")
        >>> encoder = Stack("encoder", "layers", (attention, Sublayer("feed_forward", ("fc1", "fc2"))))
        >>> register_architecture(Architecture(("my-encoder",), (encoder,), sequence_heads=("classifier",)))
    """
    for model_type in architecture.model_types:
        _REGISTRY[model_type] = architecture


def supported_architectures() -> list[str]:
    """All known model types, sorted.

    Example:
        >>> "llama" in supported_architectures()
        True
    """
    return sorted(_REGISTRY)


def architecture_of(model_type: str) -> Architecture:
    """The entry for a model type; UnsupportedArchitectureError if it is unknown."""
    if model_type not in _REGISTRY:
        raise UnsupportedArchitectureError(
            f"no switches are known for the architecture {model_type!r}; known are: "
            f"{', '.join(supported_architectures())}. Describe yours with sd_gym.switch.register_architecture()."
        )
    return _REGISTRY[model_type]


def _bart_like(norm: bool) -> tuple[Stack, ...]:
    """Encoder and decoder layers as BART names them, with the norms before (mBART) or after (BART)."""

    def chain(norm_name: str, *modules: str) -> tuple[str, ...]:
        return (norm_name, *modules) if norm else modules

    attention = Sublayer("attention", chain("self_attn_layer_norm", "self_attn"), output="self_attn.out_proj")
    cross_attention = Sublayer(
        "cross_attention",
        chain("encoder_attn_layer_norm", "encoder_attn"),
        output="encoder_attn.out_proj",
        source=("encoder_attn.k_proj", "encoder_attn.v_proj"),
    )
    feed_forward = Sublayer("feed_forward", chain("final_layer_norm", "fc1", "fc2"))
    norms = () if norm else ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    return (
        Stack("encoder", "encoder.layers", (attention, feed_forward), whole=norm, norms=norms[::2]),
        Stack("decoder", "decoder.layers", (attention, cross_attention, feed_forward), whole=norm, norms=norms),
    )


def _encoder_decoder(model_types: tuple[str, ...], stacks: tuple[Stack, ...]) -> Architecture:
    heads = ("classification_head.dense", "classification_head.out_proj")
    return Architecture(model_types, stacks, token_heads=("lm_head", "qa_outputs"), sequence_heads=heads)


register_architecture(_encoder_decoder(("bart", "marian"), _bart_like(norm=False)))
register_architecture(_encoder_decoder(("mbart", "pegasus"), _bart_like(norm=True)))

_T5_SELF, _T5_CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
_T5_ATTENTION = Sublayer("attention", ("layer.0",), True, f"{_T5_SELF}.o", position_bias=_T5_SELF)
_T5_STACKS = (
    Stack("encoder", "encoder.block", (_T5_ATTENTION, Sublayer("feed_forward", ("layer.1",), True))),
    Stack(
        "decoder",
        "decoder.block",
        (
            _T5_ATTENTION,
            Sublayer(
                "cross_attention",
                ("layer.1",),
                adds_residual=True,
                output=f"{_T5_CROSS}.o",
                source=(f"{_T5_CROSS}.k", f"{_T5_CROSS}.v"),
                position_bias=_T5_CROSS,
            ),
            Sublayer("feed_forward", ("layer.2",), True),
        ),
    ),
)
register_architecture(_encoder_decoder(("t5",), _T5_STACKS))

# Decoder-only models: model types, layers, attention's modules, its output projection, feed-forward's modules.
_DECODERS = (
    ("gpt2", "h", "ln_1 attn", "attn.c_proj", "ln_2 mlp"),
    (
        "llama mistral qwen2 qwen3 phi3",
        "layers",
        "input_layernorm self_attn",
        "self_attn.o_proj",
        "post_attention_layernorm mlp",
    ),
    (
        "gemma3_text",
        "layers",
        "input_layernorm self_attn post_attention_layernorm",
        "self_attn.o_proj",
        "pre_feedforward_layernorm mlp post_feedforward_layernorm",
    ),
)
for _types, _layers, _attention, _output, _feed_forward in _DECODERS:
    _sublayers = (
        Sublayer("attention", tuple(_attention.split()), output=_output),
        Sublayer("feed_forward", tuple(_feed_forward.split())),
    )
    _stacks, _heads = (Stack("decoder", _layers, _sublayers, whole=True),), ("lm_head", "score", "qa_outputs")
    register_architecture(Architecture(tuple(_types.split()), _stacks, causal=True, token_heads=_heads))

_BERT_TOKEN_HEADS = (
    "qa_outputs cls.predictions.transform.dense cls.predictions.decoder lm_head.dense lm_head.decoder "
    "generator_predictions.dense generator_lm_head electra.embeddings_project embeddings_project"
)
_BERT_SUBLAYERS = (
    Sublayer("attention", ("attention",), adds_residual=True, output="attention.output.dense"),
    Sublayer("feed_forward", ("intermediate", "output"), adds_residual=True),
)
_DISTILBERT_SUBLAYERS = (
    Sublayer("attention", ("attention",), output="attention.out_lin"),
    Sublayer("feed_forward", ("ffn",)),
)
register_architecture(
    Architecture(
        model_types=("bert", "roberta", "electra"),
        stacks=(Stack("encoder", "encoder.layer", _BERT_SUBLAYERS, whole=True),),
        token_heads=tuple(_BERT_TOKEN_HEADS.split()),
        sequence_heads=("bert.pooler.dense", "pooler.dense", "classifier", "classifier.dense", "classifier.out_proj"),
    )
)
_DISTILBERT_NORMS = ("sa_layer_norm", "output_layer_norm")
register_architecture(
    Architecture(
        model_types=("distilbert",),
        stacks=(Stack("encoder", "transformer.layer", _DISTILBERT_SUBLAYERS, norms=_DISTILBERT_NORMS),),
        token_heads=("qa_outputs", "vocab_transform", "vocab_projector"),
        sequence_heads=("pre_classifier", "classifier"),
    )
)
