"""What the first layer of a backbone shows of an input, before any decision is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sd_gym.switch.switchboard import Switchboard


class _Reached(Exception):  # noqa: N818  (no error: it ends the pass on purpose)
    """The module was reached; carries what was looked for."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


@torch.inference_mode()
def first_layer_input(board: Switchboard, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states that enter the first layer, ``[batch, length, width]``; no layer runs.

    The cheapest representation of an input, and the policy's observation (Zhang et al. 2024, section 3). The forward
    pass is stopped by an exception, which works for any architecture.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from sd_gym.switch import Switchboard
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ... )
        >>> board = Switchboard(BertForSequenceClassification(config).eval())
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> hidden = first_layer_input(board, {"input_ids": 5 * mask, "attention_mask": mask})
        >>> hidden.shape
        torch.Size([2, 3, 16])
        >>> pooled(hidden, mask).shape
        torch.Size([2, 32])
    """

    def stop(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    layer = board.switches[0].layer
    return _run_until(board, inputs, layer.register_forward_pre_hook(stop, with_kwargs=True))


@torch.inference_mode()
def attention_received(board: Switchboard, inputs: dict[str, Tensor]) -> Tensor:
    """How much each token is attended to in the first layer, ``[batch, length]``; that layer's attention runs only.

    The mean over heads and over the input's tokens (not its padding) that attend, as Learned Token Pruning ranks tokens
    (Kim et al. 2022, equation 3). The attention is computed eagerly, whatever the model's implementation.

    Args:
        board: The switchboard.
        inputs: The model's inputs, ``attention_mask`` among them.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from sd_gym.switch import Switchboard
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ... )
        >>> board = Switchboard(BertForSequenceClassification(config).eval())
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> received = attention_received(board, {"input_ids": 5 * mask, "attention_mask": mask})
        >>> received.sum(dim=1).round().tolist()  # each token that attends shares out 1
        [1.0, 1.0]
    """
    switch = next(switch for switch in board.switches if switch.sublayer.output is not None)
    module = switch.layer.get_submodule(switch.sublayer.attention)

    def stop(module: nn.Module, args: tuple, output: tuple) -> None:
        raise _Reached(output[-1])

    implementation = board.model.config._attn_implementation
    board.model.set_attn_implementation("eager")
    try:
        weights = _run_until(board, inputs, module.register_forward_hook(stop))
    finally:
        board.model.set_attn_implementation(implementation)
    present = inputs["attention_mask"].to(weights.dtype)
    return (weights.mean(dim=1) * present[:, :, None]).sum(dim=1) / present.sum(dim=1, keepdim=True)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean and maximum over the tokens that ``mask`` keeps: ``[batch, 2 * width]`` (Zhang et al. 2024, section 3).

    Example:
        >>> pooled(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2., 3.]])
    """
    kept = mask.bool().unsqueeze(-1)
    mean = (hidden * kept).sum(dim=1) / kept.sum(dim=1)
    return torch.cat([mean, hidden.masked_fill(~kept, -torch.inf).amax(dim=1)], dim=1)


def _run_until(board: Switchboard, inputs: dict[str, Tensor], hook: Any) -> Tensor:
    try:
        board.model(**inputs)
    except _Reached as reached:
        return reached.value
    finally:
        hook.remove()
    raise RuntimeError("the forward pass ended without reaching the first layer")
