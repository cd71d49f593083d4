"""What the first layer of a backbone computes of an input, before any decision is made."""

import copy
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sd_gym.switch.switchboard import Switchboard
from sd_gym.switch.twin import twin_at, twin_of


@torch.inference_mode()
def first_layer_input(board: Switchboard, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states that enter the first layer, ``[batch, length, width]``; no layer runs.

    They are the cheapest representation of an input, and the policy's observation (Zhang et al. 2024, section 3). An
    exception stops the forward pass, which works for any architecture.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from sd_gym.switch import Switchboard
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> board = Switchboard(BertForSequenceClassification(config).eval())
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> hidden = first_layer_input(board, {"input_ids": 5 * mask, "attention_mask": mask})
        >>> hidden.shape
        torch.Size([2, 3, 16])
        >>> pooled(hidden, mask).shape
        torch.Size([2, 32])
    """
    return board.run_to("first", lambda: board.model(**inputs)).hidden


class FirstLayerInput(nn.Module):
    """``first_layer_input`` as a module that shares the embeddings, to be copied or traced."""

    def __init__(self, board: Switchboard) -> None:
        super().__init__()
        self.model = twin_of(board.model)
        for stack in board.architecture.stacks:
            twin_at(self.model, board.path_of_layers(stack))._modules = {"0": _End()}

    def forward(self, **inputs: Tensor) -> Tensor:
        """For the inputs of the model."""
        try:
            self.model(**inputs)
        except _Reached as reached:
            return reached.args[0]
        raise RuntimeError("the forward pass ended without reaching the first layer")


@torch.inference_mode()
def attention_received(board: Switchboard, inputs: dict[str, Tensor]) -> Tensor:
    """How much each token is attended to in the first layer, ``[batch, length]``; only that attention runs.

    It is the mean over heads and over the input's tokens, without padding, as Learned Token Pruning ranks tokens (Kim
    et al. 2022, equation 3). The attention is computed eagerly, whatever the model's implementation.

    ``inputs`` must contain ``attention_mask``.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from sd_gym.switch import Switchboard
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> board = Switchboard(BertForSequenceClassification(config).eval())
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> received = attention_received(board, {"input_ids": 5 * mask, "attention_mask": mask})
        >>> received.sum(dim=1).round().tolist()  # a mean over tokens, each of which attends with a total weight of 1
        [1.0, 1.0]
    """
    with board.decide(np.zeros((1, len(board)), dtype=bool)):  # in case another decision is in force here
        try:
            _eager_twin(board)(**inputs)
            raise RuntimeError("the forward pass ended without reaching the first layer")
        except _Reached as reached:
            weights: Tensor = reached.args[0]
    present = inputs["attention_mask"].to(weights.dtype)
    return (weights.mean(dim=1) * present[:, :, None]).sum(dim=1) / present.sum(dim=1, keepdim=True)


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean and maximum over the tokens that ``mask`` keeps: ``[batch, 2 * width]`` (Zhang et al. 2024, section 3).

    ``mask`` ``[batch, length]`` is 0 at padding; ``None``: no padding, which is faster than a mask of ones.

    Example:
        >>> pooled(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2., 3.]])
    """
    if mask is None:
        return torch.cat([hidden.sum(dim=1) / hidden.shape[1], hidden.amax(dim=1)], dim=1)
    kept = mask.bool().unsqueeze(-1)
    mean = (hidden * kept).sum(dim=1) / kept.sum(dim=1)
    return torch.cat([mean, hidden.masked_fill(~kept, -torch.inf).amax(dim=1)], dim=1)


class _Reached(Exception):  # noqa: N818  (not an error: it ends the pass on purpose)
    """Carries the tensor that the pass was for."""


class _End(nn.Module):
    """Replaces all layers: the pass ends there."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> NoReturn:
        raise _Reached(hidden_states)


def _eager_twin(board: Switchboard) -> nn.Module:
    """A twin of the model whose first attention runs eagerly and ends the pass; other threads are not affected."""
    switch = next(switch for switch in board.switches if switch.sublayer.output is not None)
    twin, attention = twin_of(board.model), f"{board.path_of(switch)}.{switch.sublayer.attention}"
    _make_eager(twin, attention, {})
    module: Any = twin.get_submodule(attention)

    def forward(*args: Any, **kwargs: Any) -> None:
        raise _Reached(type(module).forward(module, *args, **kwargs)[-1])

    vars(module)["forward"] = forward
    return twin


def _make_eager(twin: nn.Module, path: str | None, configs: dict[int, PretrainedConfig]) -> None:
    """Give a twin, and its parts on a path (``None``: all parts), an eager configuration."""
    config = vars(twin).get("config")
    if config is not None:
        if id(config) not in configs:
            configs[id(config)] = copy.copy(config)
            configs[id(config)]._attn_implementation = "eager"
        vars(twin)["config"] = configs[id(config)]
    name, _, rest = (path or "").partition(".")
    for part in [name] if path else [name for name, part in twin._modules.items() if part is not None]:
        _make_eager(twin_at(twin, part), (rest or None) if path else None, configs)
