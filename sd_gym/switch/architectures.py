"""Which modules of a Hugging Face model are switches: one declarative entry per architecture.

An entry only names attributes; no model code is copied. ``register_architecture`` adds an entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

SublayerKind = Literal["attention", "cross_attention", "feed_forward"]


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a layer.

    Attributes:
        kind: Kind of sublayer; the last part of the switch's name (``encoder.0.attention``).
        modules: Paths of the branch's modules inside the layer, in execution order. Each output is the next module's
            first input, as with a norm and an attention, or BART's ``fc1`` and ``fc2``.
        adds_residual: Whether the last module itself adds the branch's input, as BERT's output modules do. Then a
            skipped row passes through unchanged. Otherwise it gets zeros, and the layer adds the residual.
        output: Path of an attention's output projection inside the layer. The attention proper is the module of
            ``modules`` that contains it.
        source: Paths of the projections that read the encoder's output (keys and values of a cross-attention).
        position_bias: Path of the module whose ``compute_bias`` makes the bias that all layers share (T5's relative
            positions). It is needed even where the first layer is skipped.
    """

    kind: SublayerKind
    modules: tuple[str, ...]
    adds_residual: bool = False
    output: str | None = None
    source: tuple[str, ...] = ()
    position_bias: str | None = None

    @property
    def attention(self) -> str | None:
        """Path of the attention proper; ``None`` in a feed-forward."""
        return next((path for path in self.modules if self.output and self.output.startswith(path + ".")), None)


@dataclass
class Switch:
    """The place where one candidate is skipped or run.

    Attributes:
        name: ``stack.layer.kind``, such as ``decoder.3.cross_attention``.
        stack: Name of its stack.
        index: Index of its layer in the stack.
        layer: Its layer.
        sublayer: What it switches.
        reads_input: Whether its stack reads the input, whose tokens can be dropped.
        decodes: Whether its stack fills a key-value cache.
        modules: The switched modules, in execution order.
    """

    name: str
    stack: str
    index: int
    layer: nn.Module
    sublayer: Sublayer
    reads_input: bool
    decodes: bool
    modules: list[nn.Module] = field(init=False, repr=False)

    @property
    def tags_cache(self) -> bool:
        """Whether it records decisions in the key-value cache: the first self-attention that fills it does."""
        return self.decodes and self.index == 0 and self.sublayer.kind == "attention"

    def __post_init__(self) -> None:
        self.modules = [self.layer.get_submodule(path) for path in self.sublayer.modules]


@dataclass(frozen=True)
class Stack:
    """A list of equal layers.

    Attributes:
        name: ``encoder`` or ``decoder``. A decoder after an encoder runs on the target. A single stack of either name
            runs on the input.
        layers: Path of the layer list inside ``model.base_model``.
        sublayers: Residual branches of each layer, in execution order.
        norms: If a layer takes and returns nothing but hidden states: paths of all norms after residual sums, in
            execution order. Where no sublayer runs, the layer is skipped and only these norms run. ``None``: the layer
            has other outputs, so it always runs.
    """

    name: str
    layers: str
    sublayers: tuple[Sublayer, ...]
    norms: tuple[str, ...] | None = None

    @property
    def passes_through(self) -> bool:
        """Whether a layer in which nothing runs returns the hidden states as they are; norms after sums change them."""
        return self.norms == () or all(sublayer.adds_residual for sublayer in self.sublayers)

    def layers_in(self, model: PreTrainedModel) -> nn.ModuleList:
        """The layers of a model; raises ``UnsupportedArchitectureError`` if it lacks the stack."""
        try:
            return cast("nn.ModuleList", model.base_model.get_submodule(self.layers))
        except AttributeError:
            raise UnsupportedArchitectureError(
                f"a {type(model).__name__} has no {self.layers!r}, the {self.name} of a {model.config.model_type}; use "
                "a class that has it, or describe yours with sd_gym.switch.register_architecture()"
            ) from None


@dataclass(frozen=True)
class Architecture:
    """Where the switches of an architecture are, and which linear layers outside of its stacks always run.

    Attributes:
        model_types: Values of ``model.config.model_type`` that this entry is for.
        stacks: Layer stacks in execution order; the first reads the input.
        causal: Whether positions of the first stack attend only to earlier positions (decoder-only models).
        token_heads: Paths of linear layers that run once per target (or source) token, such as ``lm_head``.
        sequence_heads: Paths of linear layers that run once per sequence, such as a classifier; in a
            ``...ForTokenClassification`` once per token. Paths that a model does not have are ignored, so one entry
            serves all heads.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    causal: bool = False
    token_heads: tuple[str, ...] = ()
    sequence_heads: tuple[str, ...] = ()


class UnsupportedArchitectureError(ValueError):
    """No architecture is registered for the model type, or a class of it has other layers."""


_REGISTRY: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Register an architecture for each of its model types; a later entry replaces an earlier one.

    Example:
        >>> from sd_gym.switch import Architecture, Stack, Sublayer, register_architecture
        >>> attention = Sublayer("attention", ("norm", "self_attn"), output="self_attn.out_proj")
        >>> encoder = Stack("encoder", "layers", (attention, Sublayer("feed_forward", ("fc1", "fc2"))))
        >>> register_architecture(Architecture(("my-encoder",), (encoder,), sequence_heads=("classifier",)))
    """
    for model_type in architecture.model_types:
        _REGISTRY[model_type] = architecture


def supported_architectures() -> list[str]:
    """All registered model types, sorted.

    Example:
        >>> "llama" in supported_architectures()
        True
    """
    return sorted(_REGISTRY)


def architecture_of(model_type: str) -> Architecture:
    """The entry of a model type; raises ``UnsupportedArchitectureError`` if there is no such entry."""
    if model_type not in _REGISTRY:
        raise UnsupportedArchitectureError(
            f"unsupported architecture {model_type!r}; supported: {', '.join(supported_architectures())}. "
            "Describe yours with sd_gym.switch.register_architecture()."
        )
    return _REGISTRY[model_type]


def _encoder_decoder(model_types: tuple[str, ...], stacks: tuple[Stack, ...]) -> None:
    heads = ("classification_head.dense", "classification_head.out_proj")
    register_architecture(
        Architecture(model_types, stacks, token_heads=("lm_head", "qa_outputs"), sequence_heads=heads)
    )


def _bart_like(model_types: tuple[str, ...], *, pre_norm: bool) -> None:
    """Layers with BART's names, and norms before (mBART) or after (BART) the sublayers."""

    def chain(norm: str, *modules: str) -> tuple[str, ...]:
        return (norm, *modules) if pre_norm else modules

    attention = Sublayer("attention", chain("self_attn_layer_norm", "self_attn"), output="self_attn.out_proj")
    cross_attention = Sublayer(
        "cross_attention",
        chain("encoder_attn_layer_norm", "encoder_attn"),
        output="encoder_attn.out_proj",
        source=("encoder_attn.k_proj", "encoder_attn.v_proj"),
    )
    feed_forward = Sublayer("feed_forward", chain("final_layer_norm", "fc1", "fc2"))
    norms = () if pre_norm else ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    encoder = Stack("encoder", "encoder.layers", (attention, feed_forward), norms=norms[::2])
    decoder = Stack("decoder", "decoder.layers", (attention, cross_attention, feed_forward), norms=norms)
    _encoder_decoder(model_types, (encoder, decoder))


_bart_like(("bart", "marian"), pre_norm=False)
_bart_like(("mbart", "pegasus"), pre_norm=True)

_T5_SELF, _T5_CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
_T5_ATTENTION = Sublayer("attention", ("layer.0",), True, f"{_T5_SELF}.o", position_bias=_T5_SELF)
_T5_CROSS_ATTENTION = Sublayer(
    "cross_attention",
    ("layer.1",),
    adds_residual=True,
    output=f"{_T5_CROSS}.o",
    source=(f"{_T5_CROSS}.k", f"{_T5_CROSS}.v"),
    position_bias=_T5_CROSS,
)
_T5_ENCODER, _T5_DECODER = (
    (_T5_ATTENTION, Sublayer("feed_forward", ("layer.1",), True)),
    (_T5_ATTENTION, _T5_CROSS_ATTENTION, Sublayer("feed_forward", ("layer.2",), True)),
)
_encoder_decoder(
    ("t5",), (Stack("encoder", "encoder.block", _T5_ENCODER), Stack("decoder", "decoder.block", _T5_DECODER))
)


def _decoder_only(model_types: str, layers: str, attention: str, output: str, feed_forward: str) -> None:
    sublayers = (
        Sublayer("attention", tuple(attention.split()), output=output),
        Sublayer("feed_forward", tuple(feed_forward.split())),
    )
    stacks, heads = (Stack("decoder", layers, sublayers, norms=()),), ("lm_head", "score", "qa_outputs", "classifier")
    register_architecture(Architecture(tuple(model_types.split()), stacks, causal=True, token_heads=heads))


_decoder_only("gpt2", "h", "ln_1 attn", "attn.c_proj", "ln_2 mlp")
_decoder_only(
    "llama mistral qwen2 qwen3 phi3",
    "layers",
    "input_layernorm self_attn",
    "self_attn.o_proj",
    "post_attention_layernorm mlp",
)
_decoder_only(
    "gemma3_text",
    "layers",
    "input_layernorm self_attn post_attention_layernorm",
    "self_attn.o_proj",
    "pre_feedforward_layernorm mlp post_feedforward_layernorm",
)

_BERT_TOKEN_HEADS = (
    "qa_outputs cls.predictions.transform.dense cls.predictions.decoder lm_head.dense lm_head.decoder "
    "generator_predictions.dense generator_lm_head electra.embeddings_project embeddings_project "
    "discriminator_predictions.dense discriminator_predictions.dense_prediction"
)
_BERT_SEQUENCE_HEADS = (
    "bert.pooler.dense roberta.pooler.dense pooler.dense classifier cls.seq_relationship sequence_summary.summary"
)
_BERT_SUBLAYERS = (
    Sublayer("attention", ("attention",), adds_residual=True, output="attention.output.dense"),
    Sublayer("feed_forward", ("intermediate", "output"), adds_residual=True),
)
register_architecture(
    Architecture(
        model_types=("bert", "roberta", "electra"),
        stacks=(Stack("encoder", "encoder.layer", _BERT_SUBLAYERS, norms=()),),
        token_heads=tuple(_BERT_TOKEN_HEADS.split()),
        sequence_heads=tuple(_BERT_SEQUENCE_HEADS.split()),
    )
)
_DISTILBERT_SUBLAYERS = (
    Sublayer("attention", ("attention",), output="attention.out_lin"),
    Sublayer("feed_forward", ("ffn",)),
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
