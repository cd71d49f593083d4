"""A plain, smaller model without the layers that a static mask skips."""

from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedModel

from sd_gym.execution.bank import checked_mask, without_skipped
from sd_gym.policy.artefact import switchboard_of
from sd_gym.switch import Switchboard
from sd_gym.switch.twin import twin_at

# How configs of transformers name the number of layers of a single stack, and of each of two.
COUNTS = {
    "lone": ("num_hidden_layers",),
    "encoder": ("encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
OF_EACH_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists in a config, one value per layer


def bake(model: PreTrainedModel, mask: ArrayLike) -> PreTrainedModel:
    """A new model, on the same device, without the layers that a mask skips; it needs no ``sd_gym``.

    Its outputs equal those of the switched model under the mask, bit for bit. Transformers saves and loads it, and
    tools for models of its class accept it: ONNX, CTranslate2, vLLM.

    Args:
        model: A model of a supported architecture, attached or not; it is not changed.
        mask: A decision, 1 = skip, ``[switches]`` or, with token level 0 after it, ``[switches + 1]``.

    Raises:
        ValueError: If the mask has another shape, drops tokens, or skips a part of a layer or all of a stack. Also if
            layers of this model cannot be removed: something in them always runs, or depends on their number.

    Example:
        >>> import sd_gym
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
        ... )
        >>> smaller = sd_gym.bake(BertForSequenceClassification(config), [0, 0, 1, 1, 0, 0])
        >>> smaller.config.num_hidden_layers
        2
    """
    with switchboard_of(model) as board:
        skipped = checked_mask(mask, board)
        kept, twin = _kept(board, skipped), without_skipped(board, skipped)
        config = _config(board, kept)
        for stack in board.architecture.stacks:
            layers = twin_at(twin, board.path_of_layers(stack))
            layers._modules = {str(new): layers._modules[str(old)] for new, old in enumerate(kept[stack.name])}
        weights = twin.state_dict()
    smaller = type(model)._from_config(config, attn_implementation=model.config._attn_implementation, dtype=model.dtype)
    shapes = [{name: weight.shape for name, weight in of.items()} for of in (weights, smaller.state_dict())]
    if shapes[0] != shapes[1]:
        reason = f"the weights of this {type(model).__name__} do not fit a plain one of fewer layers"
        raise ValueError(f"{reason}; merge adapters, and bake before quantising")
    for name, own in smaller.state_dict(keep_vars=True).items():
        own.data = own.data.to(weights[name].dtype)  # some stay in float32 where the model is in half precision
    smaller.load_state_dict(weights)
    if getattr(model, "generation_config", None) is not None:
        smaller.generation_config = deepcopy(model.generation_config)
    # A decorator of transformers hides the signature.
    return smaller.to(model.device).train(model.training)  # pyright: ignore[reportArgumentType]


def _kept(board: Switchboard, mask: np.ndarray) -> dict[str, list[int]]:
    """The layers of each stack that stay, by its name."""
    kept, config = {}, board.model.config
    for stack in board.architecture.stacks:
        own = [switch.stack == stack.name for switch in board.switches]
        skips = mask[own].reshape(-1, len(stack.sublayers))  # [layers, sublayers]
        if len(halves := np.flatnonzero(skips.any(axis=1) & ~skips.all(axis=1))):
            where = f"{stack.name} layers {halves.tolist()}"
            raise ValueError(f"the mask skips a part of {where} only; skip all of their switches, or none")
        kept[stack.name] = np.flatnonzero(~skips.any(axis=1)).tolist()
        if not skips.any():
            continue
        if not stack.passes_through:
            reason = "a norm after each residual sum runs even where all is skipped"
            raise ValueError(f"layers of a {config.model_type} cannot be removed: {reason}")
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise ValueError("layers of this model cannot be removed: its attentions are scaled by their number")
        if not kept[stack.name]:
            raise ValueError(f"the mask skips all layers of the {stack.name}; leave at least one")
    return kept


def _config(board: Switchboard, kept: dict[str, list[int]]) -> Any:
    """The config of a model with these layers."""
    config, lone = deepcopy(board.model.config), len(kept) == 1
    for stack, layers in kept.items():
        counts = COUNTS["lone" if lone else stack]
        count = next((name for name in counts if hasattr(config, name)), None)
        if count is None:
            raise ValueError(f"expected {' or '.join(counts)} in the config, the number of layers of its {stack}")
        for name in OF_EACH_LAYER if lone else ():
            of_each = getattr(config, name, None)
            if isinstance(of_each, list) and len(of_each) == getattr(config, count):
                setattr(config, name, [of_each[index] for index in layers])
        setattr(config, count, len(layers))
    last = len(list(kept.values())[-1])
    if config.get_text_config(decoder=True).num_hidden_layers < last:
        reason = f"its decoder ({last} layers) needs at least as many layers in the encoder, for its cache"
        raise ValueError(f"a {config.model_type} cannot be baked so: {reason}; skip layers of the decoder, too")
    return config
