"""One forward pass of any backbone, whatever kind of output it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.spans import span_logits
from sd_gym.switch import Switchboard

NO_MODEL_INPUTS = ("labels", "context_mask")


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model reads to represent its input."""
    return {name: value for name, value in batch.items() if name not in NO_MODEL_INPUTS}


def kept_of_pass(board: Switchboard, keep: NDArray | Tensor | None, labels: Tensor) -> NDArray | Tensor | None:
    """The tokens that a pass of ``forward`` keeps, ``[batch, length]``: of an answer behind a prompt, all.

    Args:
        board: The backbone's switchboard.
        keep: The tokens of the input that are kept; ``None``: all.
        labels: What the pass is teacher-forced on, if the backbone generates.
    """
    if keep is None or not (board.model.can_generate() and board.architecture.causal):
        return keep
    return F.pad(torch.as_tensor(keep), (0, labels.shape[1] - 1), value=1)


def forward(board: Switchboard, batch: dict[str, Tensor], call: Callable[..., Any] | None = None) -> Tensor:
    """Logits of one forward pass, teacher-forced where the backbone generates.

    Args:
        board: The backbone's switchboard; its decisions in force apply.
        batch: The model's inputs with ``labels`` where it generates, and ``context_mask``, bool ``[batch, length]``,
            where it extracts: the tokens at which an answer may begin and end.
        call: What to call instead of the model (the same model, wrapped for several processes).

    Returns:
        ``[batch, target length, vocabulary]``, ``[batch, classes]``, or ``[batch, 2, length]`` (starts and ends).
    """
    model = call or board.model
    if board.model.can_generate():
        if board.architecture.causal:
            return _continuation(model, **batch)
        # Given labels, the model would make a loss as well.
        decoder_input_ids = board.model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return model(**model_inputs(batch), decoder_input_ids=decoder_input_ids, use_cache=False).logits
    output = model(**model_inputs(batch))
    if "context_mask" in batch:
        return span_logits(output.start_logits, output.end_logits, batch["context_mask"])
    return output.logits


def _continuation(model: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Logits of the labels behind prompts that are padded at the left."""
    given = labels[:, :-1]  # nothing follows the last one
    input_ids = torch.cat([input_ids, given.clamp(min=0)], dim=1)
    mask = torch.cat([attention_mask, (given >= 0).long()], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    keep = labels.shape[1]
    return model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
    ).logits
