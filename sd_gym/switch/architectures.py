"""Which modules of a Hugging Face model are switches, one declarative entry an architecture.

An entry names attributes and nothing else: no model code is copied or patched. ``register_architecture`` adds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "cross_attention", "feed_forward"]


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a layer.

    Attributes:
        kind: What it is; names the switch (``encoder.0.attention``).
        modules: Attribute paths inside the layer, in execution order: one module, or the first and the last of a
            branch that the layer spells out (BART's ``fc1`` and ``fc2``).
        adds_residual: Whether the last module adds the branch's input itself, as BERT's output modules do. Then a
            skipped row passes through unchanged; otherwise it gets zeros and the layer's own residual sum passes it.
        query: Path of the query projection inside an attention; its output width is the width of all heads.
        source: Paths of the projections that read the encoder's output (keys and values of a cross-attention).
    """

    kind: Kind
    modules: tuple[str, ...]
    adds_residual: bool = False
    query: str | None = None
    source: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A list of equal layers.

    Attributes:
        name: ``encoder`` or ``decoder``; a stack called ``decoder`` runs on the target, every other on the source.
        layers: Path of the layer list inside ``model.base_model``.
        sublayers: Residual branches of each layer, in execution order.
    """

    name: str
    layers: str
    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True)
class Architecture:
    """Where the switches of an architecture are, and which linears outside its layers always run.

    Attributes:
        model_types: Values of ``model.config.model_type`` that this entry is for.
        stacks: Layer stacks in execution order.
        token_heads: Paths inside the model of linears that run once a target (or source) token, such as ``lm_head``.
        sequence_heads: Paths inside the model of linears that run once a sequence, such as a classifier.
            Paths that a model does not have are passed over, so one entry serves all heads.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
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
        ...                     Sublayer("attention", ("self_attn",), query="q_proj"),
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
    """All known model types, sorted."""
    return sorted(_REGISTRY)


def architecture_of(model_type: str) -> Architecture:
    """The entry for a model type.

    Raises:
        UnsupportedArchitectureError: If there is none; the message lists the known ones and says how to add one.
    """
    if model_type not in _REGISTRY:
        raise UnsupportedArchitectureError(
            f"no switches are known for the architecture {model_type!r}; known are: "
            f"{', '.join(supported_architectures())}. Describe yours with sd_gym.switch.register_architecture()."
        )
    return _REGISTRY[model_type]


_BART_SELF = Sublayer("attention", ("self_attn",), query="q_proj")
_BART_CROSS = Sublayer("cross_attention", ("encoder_attn",), query="q_proj", source=("k_proj", "v_proj"))
_BART_FEED_FORWARD = Sublayer("feed_forward", ("fc1", "fc2"))

register_architecture(
    Architecture(
        model_types=("bart", "mbart"),
        stacks=(
            Stack("encoder", "encoder.layers", (_BART_SELF, _BART_FEED_FORWARD)),
            Stack("decoder", "decoder.layers", (_BART_SELF, _BART_CROSS, _BART_FEED_FORWARD)),
        ),
        token_heads=("lm_head", "qa_outputs"),
        sequence_heads=("classification_head.dense", "classification_head.out_proj"),
    )
)
register_architecture(
    Architecture(
        model_types=("bert",),
        stacks=(
            Stack(
                "encoder",
                "encoder.layer",
                (
                    Sublayer("attention", ("attention",), adds_residual=True, query="self.query"),
                    Sublayer("feed_forward", ("intermediate", "output"), adds_residual=True),
                ),
            ),
        ),
        token_heads=("qa_outputs", "cls.predictions.transform.dense", "cls.predictions.decoder"),
        sequence_heads=("bert.pooler.dense", "pooler.dense", "classifier"),
    )
)
