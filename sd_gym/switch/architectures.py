"""Which modules of a Hugging Face model are switches, one declarative entry an architecture.

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
            first input: one module, or as many as the layer spells out (a norm in front; BART's ``fc1`` and ``fc2``).
            The first selects the rows that run, the last puts them back among the others.
        adds_residual: Whether the last module adds the branch's input itself, as BERT's output modules do. Then a
            skipped row passes through unchanged; otherwise it gets zeros and the layer's own residual sum passes it.
        output: Of an attention, the path of its output projection inside the layer; the module of ``modules`` that
            holds it is the attention proper, and the projection's input width is the width of all heads.
        source: Paths of the projections that read the encoder's output (keys and values of a cross-attention).
        position_bias: Path of a module whose ``compute_bias`` makes what the first layer shares with all others (T5's
            relative positions), so that it exists where the first layer is skipped.
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
        name: ``encoder`` or ``decoder``. Behind an encoder, a decoder runs on the target; a lone stack of either name
            runs on the input.
        layers: Path of the layer list inside ``model.base_model``.
        sublayers: Residual branches of each layer, in execution order.
        whole: Whether a layer takes and returns the hidden states alone, and returns them as they are where no
            sublayer runs (no norm follows a residual sum); then such a layer is passed by as a whole.
        norms: Of a layer that takes and returns the hidden states alone, the paths of all norms that follow its
            residual sums, in execution order: where no sublayer runs, they are what is left of it.
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
        causal: Whether the first stack's positions see only what stands before them (decoder-only models).
        token_heads: Paths inside the model of linears that run once a target (or source) token, such as ``lm_head``.
        sequence_heads: Paths inside the model of linears that run once a sequence, such as a classifier.
            Paths that a model does not have are passed over, so one entry serves all heads.
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
        >>> register_architecture(
        ...     Architecture(
        ...         model_types=("my-encoder",),
        ...         stacks=(
        ...             Stack(
        ...                 "encoder",
        ...                 layers="layers",
        ...                 sublayers=(
        ...                     Sublayer("attention", ("norm", "self_attn"), output="self_attn.out_proj"),
        ...                     Sublayer("feed_forward", ("fc1", "fc2")),
        ...                 ),
        ...             ),
        ...         ),
        ...         sequence_heads=("classifier",),
        ...     )
        ... )
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
    """The entry for a model type.

    Raises:
        UnsupportedArchitectureError: If the type is unknown; the message lists the known ones and says how to add one.
    """
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


def _bert_like() -> tuple[Stack, ...]:
    attention = Sublayer("attention", ("attention",), adds_residual=True, output="attention.output.dense")
    feed_forward = Sublayer("feed_forward", ("intermediate", "output"), adds_residual=True)
    return (Stack("encoder", "encoder.layer", (attention, feed_forward), whole=True),)


def _llama_like() -> tuple[Stack, ...]:
    attention = Sublayer("attention", ("input_layernorm", "self_attn"), output="self_attn.o_proj")
    feed_forward = Sublayer("feed_forward", ("post_attention_layernorm", "mlp"))
    return (Stack("decoder", "layers", (attention, feed_forward), whole=True),)


def _encoder_decoder(model_types: tuple[str, ...], stacks: tuple[Stack, ...]) -> Architecture:
    heads = ("classification_head.dense", "classification_head.out_proj")
    return Architecture(model_types, stacks, token_heads=("lm_head", "qa_outputs"), sequence_heads=heads)


def _decoder_only(model_types: tuple[str, ...], stacks: tuple[Stack, ...]) -> Architecture:
    return Architecture(model_types, stacks, causal=True, token_heads=("lm_head", "score", "qa_outputs"))


register_architecture(_encoder_decoder(("bart", "marian"), _bart_like(norm=False)))
register_architecture(_encoder_decoder(("mbart", "pegasus"), _bart_like(norm=True)))

_T5_SELF = Sublayer(
    "attention",
    ("layer.0",),
    adds_residual=True,
    output="layer.0.SelfAttention.o",
    position_bias="layer.0.SelfAttention",
)
_T5_CROSS = Sublayer(
    "cross_attention",
    ("layer.1",),
    adds_residual=True,
    output="layer.1.EncDecAttention.o",
    source=("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
    position_bias="layer.1.EncDecAttention",
)
register_architecture(
    _encoder_decoder(
        model_types=("t5",),
        stacks=(
            Stack("encoder", "encoder.block", (_T5_SELF, Sublayer("feed_forward", ("layer.1",), adds_residual=True))),
            Stack(
                "decoder",
                "decoder.block",
                (_T5_SELF, _T5_CROSS, Sublayer("feed_forward", ("layer.2",), adds_residual=True)),
            ),
        ),
    )
)

register_architecture(
    _decoder_only(
        model_types=("gpt2",),
        stacks=(
            Stack(
                "decoder",
                "h",
                (
                    Sublayer("attention", ("ln_1", "attn"), output="attn.c_proj"),
                    Sublayer("feed_forward", ("ln_2", "mlp")),
                ),
                whole=True,
            ),
        ),
    )
)
register_architecture(_decoder_only(("llama", "mistral", "qwen2", "qwen3", "phi3"), _llama_like()))
register_architecture(
    _decoder_only(
        model_types=("gemma3_text",),
        stacks=(
            Stack(
                "decoder",
                "layers",
                (
                    Sublayer(
                        "attention",
                        ("input_layernorm", "self_attn", "post_attention_layernorm"),
                        output="self_attn.o_proj",
                    ),
                    Sublayer("feed_forward", ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")),
                ),
                whole=True,
            ),
        ),
    )
)

register_architecture(
    Architecture(
        model_types=("bert", "roberta", "electra"),
        stacks=_bert_like(),
        token_heads=(
            "qa_outputs",
            "cls.predictions.transform.dense",
            "cls.predictions.decoder",
            "lm_head.dense",
            "lm_head.decoder",
            "generator_predictions.dense",
            "generator_lm_head",
            "electra.embeddings_project",
            "embeddings_project",
        ),
        sequence_heads=(
            "bert.pooler.dense",
            "pooler.dense",
            "classifier",
            "classifier.dense",
            "classifier.out_proj",
        ),
    )
)
register_architecture(
    Architecture(
        model_types=("distilbert",),
        stacks=(
            Stack(
                "encoder",
                "transformer.layer",
                (
                    Sublayer("attention", ("attention",), output="attention.out_lin"),
                    Sublayer("feed_forward", ("ffn",)),
                ),
                norms=("sa_layer_norm", "output_layer_norm"),
            ),
        ),
        token_heads=("qa_outputs", "vocab_transform", "vocab_projector"),
        sequence_heads=("pre_classifier", "classifier"),
    )
)
