"""What the first layer of a backbone reads: the cheapest representation of an input, and the policy's observation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sd_gym.backbones.load import Backbone


class _Reached(Exception):  # noqa: N818  (no error: it ends the pass on purpose)
    """The first layer was reached; carries its input."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _stop(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


@torch.inference_mode()
def first_layer_input(backbone: Backbone, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states that enter the backbone's first layer, ``[batch, length, width]``; no layer runs.

    The forward pass is stopped by an exception at the first layer, which works for any architecture.
    """
    first = backbone.board.switches[0].layer
    hook = first.register_forward_pre_hook(_stop, with_kwargs=True)
    try:
        backbone.model(**inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        hook.remove()
    raise RuntimeError("the forward pass ended without reaching the first layer")


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean and maximum over the tokens that ``mask`` keeps: ``[batch, 2 * width]`` (Zhang et al. 2024, section 3)."""
    kept = mask.bool().unsqueeze(-1)
    mean = (hidden * kept).sum(dim=1) / kept.sum(dim=1)
    return torch.cat([mean, hidden.masked_fill(~kept, -torch.inf).amax(dim=1)], dim=1)
