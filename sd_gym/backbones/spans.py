"""Answers that are spans of the context: what start and end logits say of them."""

from __future__ import annotations

import torch
from torch import Tensor

NOWHERE = -1e9  # logit of a position where no answer may begin or end; finite, so that differences stay numbers


def span_logits(start: Tensor, end: Tensor, context_mask: Tensor) -> Tensor:
    """Start and end logits ``[batch, length]`` as one float32 ``[batch, 2, length]``, ``NOWHERE`` outside the mask."""
    return torch.stack([start, end], dim=1).float().masked_fill(~context_mask[:, None], NOWHERE)


def span_log_likelihood(logits: Tensor, spans: Tensor) -> Tensor:
    """Log-probability that the answer is one of the right spans, float32 ``[batch]``; ``-inf`` where there is none.

    Start and end are independent, and the probabilities of different spans add up (Clark and Gardner 2018).

    Args:
        logits: ``[batch, 2, length]``.
        spans: First and last token of each right span, int64 ``[batch, spans, 2]``, -100 where padded.
    """
    log_prob = logits.log_softmax(dim=-1)
    joint = log_prob.gather(-1, spans.clamp(min=0).transpose(1, 2)).sum(dim=1)
    return joint.masked_fill(spans[..., 0] < 0, -torch.inf).logsumexp(dim=1)


def best_spans(logits: Tensor, max_length: int) -> Tensor:
    """First and last token of the most probable span of each row, int64 ``[batch, 2]``.

    The span has at most ``max_length`` tokens. The first token of the input stands for "no answer" (Devlin et al. 2019,
    section 4.3) and is a span of its own only.

    Args:
        logits: ``[batch, 2, length]``, ``NOWHERE`` where no answer may begin or end.
        max_length: Longest answer, in tokens.
    """
    start, end = logits.unbind(dim=1)
    longest = min(max_length, end.shape[1])
    ends = torch.nn.functional.pad(end, (0, longest - 1), value=NOWHERE).unfold(1, longest, 1)
    scores = start[:, :, None] + ends  # [batch, first token, further tokens]
    scores[:, 0, 1:] = 2 * NOWHERE
    best = scores.flatten(1).argmax(dim=1)
    first = best // longest
    return torch.stack([first, first + best % longest], dim=1)
